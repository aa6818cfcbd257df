"""Levers against the same training without them: forward and backward of one model, taking turns, in one process.

    python -m tests.bench.bench_levers                          the mid-size model of docs/performance.md
    python -m tests.bench.bench_levers --size tiny              seconds; proves only that it runs
    python -m tests.bench.bench_levers --device cuda --bf16     on a GPU, with the peak of its memory

Each side has a model of its own with the same random weights, and a LoRA of rank 16 on every Linear of the blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

if __name__ == "__main__":
    # Also as a script: `python tests/bench/bench_levers.py`.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.bench_step import SIZES, Size, our_step, random_flux, seconds
from trainer.model.compiled import compile_blocks
from trainer.model.flux import Flux
from trainer.model.host_linear import HostLinear, keep_modulation_on_host
from trainer.offload.activations import OffloadedCheckpoint
from trainer.offload.courier import make_courier

LEVERS = ("text40", "checkpoint_half", "cpu_offload_checkpointing", "offload_modulation", "torch_compile")


def make_step(size: Size, lever: str | None, *, bf16: bool, device: str) -> Callable[[], None]:
    """One checkpointed step with a lever pulled, or none."""
    model = random_flux(size.params(), torch.bfloat16 if bf16 else torch.float32)
    if lever == "text40":
        size = dataclasses.replace(size, num_text=min(40, size.num_text // 2))
    if lever == "offload_modulation":
        _modulation_off(model, device)
    step = our_step(model, size, checkpointing=True, bf16=bf16, device=device)
    if lever == "offload_modulation":
        for module in model.modules():
            if isinstance(module, HostLinear):
                module.weight.data = module.weight.data.cpu()
    if lever == "checkpoint_half":
        model.enable_gradient_checkpointing(num_blocks=(size.depth + size.depth_single) // 2)
    if lever == "cpu_offload_checkpointing":
        model.enable_gradient_checkpointing(run=OffloadedCheckpoint(torch.device(device)))
    if lever == "torch_compile":
        compile_blocks(model, backend="inductor")
    return step


def _modulation_off(model: Flux, device: str) -> None:
    weights = {path: module for path, module in model.named_modules() if path.endswith(("_mod.lin", "modulation.lin"))}
    for path, linear in keep_modulation_on_host(model, make_courier(torch.device(device))).items():
        kept = weights[path]
        linear.weight, linear.bias = kept.get_parameter("weight"), kept.get_parameter("bias")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="mid")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="a bf16 base under autocast")
    parser.add_argument("--levers", nargs="*", choices=LEVERS, default=list(LEVERS))
    given = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {given.device}, {torch.get_num_threads()} threads")
    for lever in given.levers:
        sides = {
            name: make_step(SIZES[given.size], name, bf16=given.bf16, device=given.device) for name in (None, lever)
        }
        times: dict[str | None, list[float]] = {name: [] for name in sides}
        peaks: dict[str | None, int] = {}
        for name, step in sides.items():
            step()
            if given.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                peaks[name] = torch.cuda.max_memory_allocated() - before
        for _ in range(given.steps):
            for name, step in sides.items():
                times[name].append(seconds(step, given.device))
        plain, pulled = (statistics.median(times[name]) for name in sides)
        memory = "".join(f", passing memory {peak / 2**20:.0f} MiB" for peak in peaks.values())
        print(f"{lever:<28}without {plain:.3f} s, with {pulled:.3f} s, ratio {pulled / plain:.3f}{memory}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
