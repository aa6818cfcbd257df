"""From the start of Python to the end of the first training step, with a model file of full size, in a process of its own.

Latents and texts are taken to be cached: what is timed is imports, loading from the disk, the LoRA and the first step.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.bench.bench_loading import write_model
from tests.bench.full_size import CountedSwap, Shape, attach_lora, synchronize, training_step
from trainer.model.weights import load_flux
from trainer.offload.block_swap import swapped_prefixes
from trainer.schema.checkpoint_header import FluxParams

ROOT = Path(__file__).resolve().parents[2]
FILE_GIGABYTES = 24
SECONDS_NEEDED = 90
"""To write and read a file of full size on an ordinary disk."""


def measure_first_step(
    params: FluxParams, device: torch.device, *, is_tiny: bool, folder: Path | None, left: float
) -> str:
    """A line that says how long it took, or why it was left out."""
    place = folder or Path(tempfile.gettempdir())
    if not is_tiny and left < SECONDS_NEEDED:
        return "Start to first step: left out, the time was up."
    if not is_tiny and shutil.disk_usage(place).free < (FILE_GIGABYTES + 2) * 1e9:
        return f"Start to first step: left out, {place} has no {FILE_GIGABYTES + 2} GB free (--folder names another)."
    side, swap, num_text = (64, 0, 8) if is_tiny else (1024, 18, 512)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        path = write_model(Path(temporary), params, "published")
        command = [sys.executable, "-m", "tests.bench.first_step", path, device.type, side, swap, num_text]
        started = time.monotonic()
        try:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=max(left, 60),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "Start to first step: left out, the time was up."
        seconds = time.monotonic() - started
        if done.returncode != 0:
            return f"Start to first step: it failed ({done.stderr.strip().splitlines()[-1]})."
        size = path.stat().st_size
    return (
        f"Start of Python to the end of the first step ({size / 1e9:.2f} GB file in the system's cache, {side} px, "
        f"swap {swap}, texts and latents cached): {seconds:.1f} s, {seconds / 60:.2f} minutes."
    )


def main(path: str, kind: str, side: str, swap: str, num_text: str) -> None:
    """The process that is timed."""
    device = torch.device(kind)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    from trainer.schema.checkpoint_header import flux_params  # noqa: PLC0415 - part of what is timed
    from trainer.schema.weight_files import read_weights  # noqa: PLC0415

    on_host = swapped_prefixes(flux_params(read_weights(Path(path), "flux")), int(swap))
    model = load_flux(Path(path), dtype, device, device_of=lambda name: "cpu" if name.startswith(on_host) else device)
    model.enable_gradient_checkpointing(True)
    network = attach_lora(model, device)
    with CountedSwap(model, int(swap), device).swap:
        training_step(model, network, Shape.of_square(int(side), int(num_text)), device, dtype)()
        synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
