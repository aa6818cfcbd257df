"""Our training step against diffusers + peft: forward and backward of the same model, interleaved, in one process.

    python -m tests.bench.bench_step                     the mid-size model of docs/performance.md, about ten minutes
    python -m tests.bench.bench_step --size tiny         seconds; proves only that it runs

Both sides have the same random weights and inputs, and a LoRA of rank 16 in float32 on every Linear of the blocks (the
fused projections are one Linear with us and three or four there). bf16 is a bf16 base under autocast. Rounds alternate
which side goes first; a cell's ratio is the median of ours over the median of theirs, in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    # Also as a script: `python tests/bench/bench_step.py`.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.diffusers_flux import in_diffusers
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.lora_spec import LoraSpec

Side = Literal["ours", "diffusers+peft"]
SIDES: tuple[Side, Side] = ("ours", "diffusers+peft")
RANK = 16


@dataclass(frozen=True)
class Size:
    """A model and its sequence: `rows` x `columns` image tokens and `num_text` text tokens."""

    hidden_size: int
    num_heads: int
    depth: int
    depth_single: int
    context_in_dim: int
    rows: int
    columns: int
    num_text: int

    def params(self) -> FluxParams:
        head = self.hidden_size // self.num_heads
        rest = (head - head // 8) // 2
        return FluxParams(
            in_channels=64,
            out_channels=64,
            vec_in_dim=768,
            context_in_dim=self.context_in_dim,
            hidden_size=self.hidden_size,
            mlp_ratio=4.0,
            num_heads=self.num_heads,
            depth=self.depth,
            depth_single_blocks=self.depth_single,
            axes_dim=(head // 8, rest, rest),
            theta=10_000,
            qkv_bias=True,
            guidance_embed=True,
        )


SIZES = {
    "mid": Size(768, 12, 4, 8, 4096, 32, 32, 512),
    "tiny": Size(64, 2, 1, 2, 32, 4, 4, 8),
}


def random_flux(params: FluxParams, dtype: torch.dtype) -> Flux:
    """A frozen transformer with weights of a trained one's size, so that no activation dies or explodes."""
    model = Flux(params)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if not name.endswith("scale"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.to(dtype).eval()


def our_step(base: Flux, size: Size, *, checkpointing: bool, bf16: bool, device: str) -> Callable[[], None]:
    spec = LoraSpec(rank=RANK, alpha=RANK)
    model = base.to(device)
    network = LoraNetwork.attach(model, None, spec, torch.Generator().manual_seed(2))
    network.to(device).train()
    model.enable_gradient_checkpointing(checkpointing)
    given = inputs(size, torch.bfloat16 if bf16 else torch.float32, device)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def step() -> None:
        with autocast(bf16, device):
            output = model(
                given["img"],
                image_ids(size.rows, size.columns, device),
                given["txt"],
                text_ids(size.num_text, device),
                given["timesteps"],
                given["y"],
                given["guidance"],
            )
        (output.float() - given["target"]).square().mean().backward()
        clear(parameters)

    return step


def their_step(base: Flux, size: Size, *, checkpointing: bool, bf16: bool, device: str) -> Callable[[], None]:
    from peft import LoraConfig  # noqa: PLC0415 - only this side needs it

    model = cast("Any", in_diffusers(base)).to(base.img_in.weight.dtype).to(device)
    blocks = (model.transformer_blocks, model.single_transformer_blocks)
    linears = {id(module) for group in blocks for module in group.modules() if isinstance(module, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in linears]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights="gaussian"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    given = inputs(size, torch.bfloat16 if bf16 else torch.float32, device)

    def step() -> None:
        with autocast(bf16, device):
            output = model(
                hidden_states=given["img"],
                encoder_hidden_states=given["txt"],
                pooled_projections=given["y"],
                timestep=given["timesteps"],
                img_ids=image_ids(size.rows, size.columns, device)[0],
                txt_ids=text_ids(size.num_text, device)[0],
                guidance=given["guidance"],
                return_dict=False,
            )[0]
        (output.float() - given["target"]).square().mean().backward()
        clear(parameters)

    return step


def inputs(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    num_image = size.rows * size.columns
    return {
        "img": draw(1, num_image, 64),
        "txt": draw(1, size.num_text, size.context_in_dim),
        "y": draw(1, 768),
        "timesteps": torch.tensor([0.6], device=device),
        "guidance": torch.tensor([1.0], device=device),
        "target": draw(1, num_image, 64).float(),
    }


def autocast(bf16: bool, device: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()


def clear(parameters: Sequence[nn.Parameter]) -> None:
    """Checks that every LoRA tensor got a gradient, then drops them."""
    if any(parameter.grad is None for parameter in parameters):
        raise RuntimeError("a LoRA tensor got no gradient: the two sides don't do the same work")
    for parameter in parameters:
        parameter.grad = None


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_cell(
    size: Size, *, checkpointing: bool, bf16: bool, rounds: int, steps: int, device: str
) -> dict[Side, list[float]]:
    """Seconds of every timed step, by side. Each round runs both sides, the order changing from round to round."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    makers: dict[Side, Callable[..., Callable[[], None]]] = {"ours": our_step, "diffusers+peft": their_step}
    # Theirs first: attaching our LoRA changes the module tree of `base`, which theirs is copied from.
    base = random_flux(size.params(), dtype)
    step_of = {
        side: makers[side](base, size, checkpointing=checkpointing, bf16=bf16, device=device)
        for side in reversed(SIDES)
    }
    for step in step_of.values():
        step()
        step()
    times: dict[Side, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for _ in range(steps):
            for side in SIDES if number % 2 == 0 else tuple(reversed(SIDES)):
                times[side].append(seconds(step_of[side], device))
    return times


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="mid")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side in a round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cells", nargs="*", default=["fp32.plain", "fp32.ckpt", "bf16.plain", "bf16.ckpt"])
    parser.add_argument("--json", type=Path, help="also write all times to this file")
    arguments = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    print(f"{'cell':<12}{'side':<16}{'min s':>9}{'median s':>10}{'max s':>9}")
    record: dict[str, dict[Side, list[float]]] = {}
    for cell in arguments.cells:
        precision, mode = cell.split(".")
        times = measure_cell(
            SIZES[arguments.size],
            checkpointing=mode == "ckpt",
            bf16=precision == "bf16",
            rounds=arguments.rounds,
            steps=arguments.steps,
            device=arguments.device,
        )
        gc.collect()
        record[cell] = times
        for side in SIDES:
            low, middle, high = min(times[side]), statistics.median(times[side]), max(times[side])
            print(f"{cell:<12}{side:<16}{low:>9.3f}{middle:>10.3f}{high:>9.3f}")
        ratio = statistics.median(times["ours"]) / statistics.median(times["diffusers+peft"])
        print(f"{cell:<12}ratio of medians, ours / diffusers+peft: {ratio:.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
