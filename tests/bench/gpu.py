"""Everything about a GPU in one call of under ten minutes: full-size FLUX.1 with random weights on one NVIDIA GPU.

    python -m tests.bench.gpu --output table.md          a GPU of 24 GB or more, 32 GB of main memory; no file is needed
    python -m tests.bench.gpu --tiny                     seconds, on a CPU too; proves only that it runs
    python -m tests.bench.gpu --sd_scripts PATH          sd-scripts' own step beside it, run in that checkout

Measured: the training step (LoRA of rank 16, batch 1, AdamW, checkpointing, 512 text tokens) at 1024, 768 and 512 pixels
with 0, 18, 35 and all blocks swapped and the base in bf16, fp8 and nf4; its peak memory against the estimate; how much of
the copies' time is hidden; the step of diffusers + peft; how fast pictures and captions are encoded; and the time from the
start of Python to the end of the first step with a model file of full size.

The most important cells come first. What does not fit by the estimate is left out and said to be, and when the time is up
the rest is. The table is Markdown with date and device, for docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

if __name__ == "__main__":
    # Also as a script: `python tests/bench/gpu.py`.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.bench_loading import tiny_flux
from tests.bench.first_step import measure_first_step
from tests.bench.full_size import (
    RANK,
    CountedSwap,
    Shape,
    attach_lora,
    copy_rate,
    diffusers_step,
    random_flux,
    synchronize,
    timed,
    training_step,
)
from tests.bench.phases import measure_phases
from tests.bench.sd_scripts import measure_sd_scripts
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.memory import estimate
from trainer.schema.options import Options
from trainer.schema.parameter_counts import PUBLISHED_AUTOENCODER, PUBLISHED_DEV, PUBLISHED_T5
from trainer.schema.step_time import forward_flops
from trainer.schema.storage import Storage
from trainer.schema.swap_counts import max_blocks_to_swap

STORAGES: tuple[Storage, ...] = ("compute", "fp8", "nf4")
WARM_UP_STEPS, TIMED_STEPS = 1, 4
RESERVE_SHARE = 0.96
"""Of the device's memory that a cell may need by the estimate."""


@dataclass(frozen=True)
class Setup:
    """What is measured: sizes, and what is to be left for later parts of the time."""

    params: FluxParams
    sides: tuple[int, ...]
    swaps: tuple[int, ...]
    storages: tuple[Storage, ...]
    num_text: int
    device: torch.device
    dtype: torch.dtype
    copied_bytes: int

    def name(self, storage: Storage) -> str:
        """As the table says it."""
        if storage != "compute":
            return storage
        return "fp32" if self.dtype is torch.float32 else "bf16"

    def options(self, storage: Storage, swap: int) -> Options:
        return Options.model_validate(
            {
                "mixed_precision": "no" if self.dtype is torch.float32 else "bf16",
                "gradient_checkpointing": True,
                "network_dim": RANK,
                "network_train_unet_only": True,
                "cache_latents": True,
                "cache_text_encoder_outputs": True,
                "optimizer_type": "AdamW",
                "base_storage": None if storage == "compute" else storage,
                "blocks_to_swap": swap,
                "t5xxl_max_token_length": self.num_text,
                "device": "auto" if self.device.type == "cuda" else "cpu",
            }
        )


@dataclass(frozen=True)
class Cell:
    """One line. Times in seconds of every step; bytes; None where the device does not count."""

    storage: str
    side: int
    swap: int
    seconds: tuple[float, ...] = ()
    transfer_bytes: int = 0
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    estimated_bytes: int = 0
    left_out: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def full_setup() -> Setup:
    largest = max_blocks_to_swap(PUBLISHED_DEV.depth, PUBLISHED_DEV.depth_single_blocks)
    return Setup(
        PUBLISHED_DEV,
        (1024, 512, 768),
        (0, 18, 35, largest),
        STORAGES,
        512,
        torch.device("cuda", torch.cuda.current_device()),
        torch.bfloat16,
        2**30,
    )


def tiny_setup() -> Setup:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Setup(tiny_flux(), (64,), (0, 1, 2), ("compute", "fp8"), 8, device, torch.float32, 2**16)


def needed_bytes(setup: Setup, storage: Storage, swap: int, side: int) -> tuple[int, int]:
    """What the training phase needs on the device, the CUDA context counted apart, by the estimate."""
    result = estimate(setup.params, setup.options(storage, swap), width=side, height=side, batch_size=1)
    phase = next(phase for phase in result.phases if phase.name == "training")
    context = sum(part.bytes for part in phase.parts if part.name == "CUDA context")
    return phase.peak_bytes - context, context


def why_not(setup: Setup, storage: Storage, swap: int, side: int) -> str:
    """Why a cell cannot be measured here; empty where it can."""
    if setup.device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(setup.device).total_memory
    needed, context = needed_bytes(setup, storage, swap, side)
    if needed + context > RESERVE_SHARE * total:
        return f"needs {(needed + context) / 1e9:.1f} GB by the estimate"
    return ""


def measure_storage(setup: Setup, storage: Storage, clock: Clock, until: float) -> Iterator[Cell]:
    """All cells of one storage with one model, until no more than `until` seconds are left."""
    first = next((swap for swap in setup.swaps if not why_not(setup, storage, swap, min(setup.sides))), None)
    if first is None:
        reason = why_not(setup, storage, setup.swaps[-1], min(setup.sides))
        yield from (
            Cell(setup.name(storage), side, swap, left_out=reason) for side in setup.sides for swap in setup.swaps
        )
        return
    model = random_flux(setup.params, storage, first, setup.device, setup.dtype)
    model.enable_gradient_checkpointing(True)
    network = attach_lora(model, setup.device)
    counted = CountedSwap(model, first, setup.device)
    with counted.swap:
        # There and back: the last sides are measured while the blocks return.
        ways = [(swap, setup.sides[:2]) for swap in setup.swaps]
        ways += [(swap, setup.sides[2:]) for swap in reversed(setup.swaps) if setup.sides[2:]]
        for swap, sides in ways:
            for side in sides:
                reason = why_not(setup, storage, swap, side)
                if not reason and clock.left < until:
                    reason = "the time was up"
                if not reason and not _host_has_room(setup, storage, swap, counted):
                    reason = "not enough main memory"
                if reason:
                    yield Cell(setup.name(storage), side, swap, left_out=reason)
                    continue
                if counted.swap.blocks_to_swap != swap:
                    counted.swap.change(swap)
                    empty_cache(setup.device)
                yield measure_cell(
                    setup,
                    storage,
                    side,
                    swap,
                    lambda side=side: training_step(
                        model, network, Shape.of_square(side, setup.num_text), setup.device, setup.dtype
                    ),
                    counted,
                )


def _host_has_room(setup: Setup, storage: Storage, swap: int, counted: CountedSwap) -> bool:
    if swap <= counted.swap.blocks_to_swap:
        return True
    more = [
        estimate(setup.params, setup.options(storage, count), width=64, height=64, batch_size=1).host_peak_bytes
        for count in (swap, counted.swap.blocks_to_swap)
    ]
    return more[0] - more[1] < psutil.virtual_memory().available - 2**30


def measure_cell(
    setup: Setup,
    storage: Storage,
    side: int,
    swap: int,
    make_step: Callable[[], Callable[[], None]],
    counted: CountedSwap | None,
) -> Cell:
    device = setup.device
    needed, _ = needed_bytes(setup, storage, swap, side)
    gc.collect()
    empty_cache(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step = make_step()
        list(timed(step, device, WARM_UP_STEPS))
        fetched = 0 if counted is None else counted.fetched_bytes
        seconds = tuple(timed(step, device, TIMED_STEPS))
    except torch.OutOfMemoryError:
        return Cell(setup.name(storage), side, swap, estimated_bytes=needed, left_out="out of memory")
    transfers = 0 if counted is None else (counted.fetched_bytes - fetched) // TIMED_STEPS
    is_cuda = device.type == "cuda"
    return Cell(
        setup.name(storage),
        side,
        swap,
        seconds,
        transfers,
        torch.cuda.max_memory_allocated(device) if is_cuda else None,
        torch.cuda.max_memory_reserved(device) if is_cuda else None,
        needed,
    )


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()


def measure_diffusers(setup: Setup) -> list[Cell]:
    """Their step where all blocks fit on the device."""
    cells: list[Cell] = []
    theirs = f"{setup.name('compute')}, diffusers + peft"
    for side in setup.sides[:2]:
        reason = why_not(setup, "compute", 0, side)
        if reason:
            cells.append(Cell(theirs, side, 0, left_out=reason))
            continue
        cell = measure_cell(
            setup,
            "compute",
            side,
            0,
            lambda side=side: diffusers_step(
                setup.params, Shape.of_square(side, setup.num_text), setup.device, setup.dtype
            ),
            None,
        )
        cells.append(replace(cell, storage=theirs))
    return cells


def hidden_share(cell: Cell, unswapped: Cell | None, rate: float) -> float | None:
    """The part of the copies' own time that costs the step nothing; None where it cannot be told."""
    if unswapped is None or not cell.transfer_bytes or not cell.seconds:
        return None
    return min(1.0, max(0.0, 1 - (cell.median - unswapped.median) / (cell.transfer_bytes / rate)))


def table(setup: Setup, cells: Sequence[Cell], rate: float) -> Iterator[str]:
    """The step's cells in Markdown."""
    yield (
        "| base | px | swap | step s: min / median / max | against swap 0 | TFLOP/s | copied GB | hidden | peak GB, allocated "
        "| reserved | estimate | estimate / allocated |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    plain = {(cell.storage, cell.side): cell for cell in cells if cell.swap == 0 and cell.seconds}
    for cell in cells:
        start = f"| {cell.storage} | {cell.side} | {cell.swap} |"
        if not cell.seconds:
            yield f"{start} {cell.left_out} | | | | | | | | |"
            continue
        unswapped = plain.get((cell.storage, cell.side))
        flops = forward_flops(setup.params, (cell.side // 16) ** 2, setup.num_text, 1)
        # Backward: one product for each of forward's, attention's 2.5 times; and the forward pass again.
        work = 3 * flops[0] + 4.5 * flops[1]
        hidden = hidden_share(cell, unswapped, rate)
        yield (
            f"{start} {min(cell.seconds):.3f} / {cell.median:.3f} / {max(cell.seconds):.3f} "
            f"| {'-' if unswapped is None else f'{cell.median / unswapped.median:.3f}'} | {work / cell.median / 1e12:.1f} "
            f"| {cell.transfer_bytes / 1e9:.2f} | {'-' if hidden is None else f'{hidden:.0%}'} "
            f"| {_gigabytes(cell.allocated_bytes)} | {_gigabytes(cell.reserved_bytes)} | {cell.estimated_bytes / 1e9:.2f} "
            f"| {f'{cell.estimated_bytes / cell.allocated_bytes:.3f}' if cell.allocated_bytes else '-'} |"
        )


def _gigabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e9:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="smallest sizes; proves only that it runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="it ends before so many have passed")
    parser.add_argument("--output", type=Path, help="write the Markdown table to this file too")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--folder", type=Path, help="where the model file of full size is made (24 GB)")
    parser.add_argument("--sd_scripts", type=Path, help="a checkout of kohya-ss/sd-scripts to run beside it")
    parser.add_argument("--sd_python", type=Path, help="the Python of its environment; this one by default")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        print("no NVIDIA GPU was found; --tiny runs everything at the smallest sizes on the CPU")
        return 2
    started = time.monotonic()
    setup = tiny_setup() if arguments.tiny else full_setup()
    clock = Clock(arguments.minutes)
    rate = copy_rate(setup.device, setup.copied_bytes)
    name = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "CPU"
    lines = [
        f"{datetime.datetime.now(tz=datetime.timezone.utc).date()}, {name}, torch {torch.__version__}, rank {RANK}, batch 1, "
        f"{setup.num_text} text tokens, checkpointing, AdamW; {rate / 1e9:.1f} GB/s from the host.",
        "",
    ]
    cells: list[Cell] = []

    def show(cell: Cell) -> None:
        cells.append(cell)
        print(f"{cell.storage} {cell.side} px, swap {cell.swap}: {cell.left_out or f'{cell.median:.3f} s'}", flush=True)

    # Half of the time for bf16, the rest in equal parts; what one leaves, the next have.
    later = 0.25 * clock.left
    for number, storage in enumerate(setup.storages):
        remaining = len(setup.storages) - number - 1
        until = later + remaining * 0.18 * 60 * arguments.minutes
        for cell in measure_storage(setup, storage, clock, until):
            show(cell)
        gc.collect()
        empty_cache(setup.device)
        if storage == "compute" and clock.left > until:
            for cell in measure_diffusers(setup):
                show(cell)
    lines += [*table(setup, cells, rate), ""]
    if arguments.sd_scripts is not None:
        for line in measure_sd_scripts(
            arguments.sd_scripts, arguments.sd_python or Path(sys.executable), setup.params, setup.sides[0], clock.left
        ):
            lines.append(line)
            print(line, flush=True)
    sizes = ((), 1024) if not arguments.tiny else ((1, 2), 64)
    if clock.left > 30:
        found = measure_phases(
            setup.device,
            setup.dtype,
            autoencoder=PUBLISHED_AUTOENCODER,
            t5=PUBLISHED_T5,
            is_tiny=arguments.tiny,
            side=sizes[1],
        )
        lines += found
        print("\n".join(found), flush=True)
    gc.collect()
    empty_cache(setup.device)
    line = measure_first_step(
        setup.params, setup.device, is_tiny=arguments.tiny, folder=arguments.folder, left=clock.left
    )
    lines += [line, "", f"In all {(time.monotonic() - started) / 60:.1f} minutes."]
    text = "\n".join(lines)
    print(f"\n{text}")
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
