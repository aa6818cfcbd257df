"""The device that a run's options ask for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from trainer.schema.base import Problem, UserError
from trainer.schema.options import Options
from trainer.schema.storage import Storage
from trainer.train.findings import EXIT_OPTIONS, Findings

if TYPE_CHECKING:
    import torch

_PROBE_SIDE: Final = 256
_SLOW_FACTOR: Final = 10.0
"""A processor that has the format's instructions computes it about as fast as 32 bit, one without 50 to 300 times slower."""


def check_device(options: Options, findings: Findings) -> None:
    """Whether the device that is asked for is there; nothing is looked for where torch may choose."""
    if options.device not in ("cuda", "mps"):
        return
    import torch  # noqa: PLC0415 - seconds to import

    where = f"--device={options.device}"
    if options.device == "cuda" and not torch.cuda.is_available():
        findings.add(
            Problem(
                "no NVIDIA GPU can be used", where, "Check the driver and torch's CUDA build, or use auto.", "device"
            ),
            EXIT_OPTIONS,
        )
    if options.device == "mps" and not torch.backends.mps.is_available():
        findings.add(Problem("no Apple GPU can be used", where, "Use auto or cpu.", "device"), EXIT_OPTIONS)


def check_storage(storage: Storage, device: torch.device) -> None:
    """Raises `UserError` (exit code 2) for a storage that the device has no instructions for."""
    if device.type == "mps" and storage in ("fp8", "nf4"):
        raise UserError(
            f"an Apple GPU cannot compute with {storage}",
            "--base_storage",
            "Use --base_storage=int8.",
            field="base_storage",
            exit_code=2,
        )


def slow_format(device: torch.device, dtype: torch.dtype, seconds_of: Callable[[torch.dtype], float]) -> str | None:
    """What to say when a CPU has no instructions for `dtype`, so that torch computes it number by number.

    `seconds_of` a format is what a matrix product takes in it; see `product_seconds`. It is asked on a CPU only.
    """
    import torch  # noqa: PLC0415 - seconds to import, which the checks before a run do without

    if device.type != "cpu" or dtype is torch.float32:
        return None
    factor = seconds_of(dtype) / seconds_of(torch.float32)
    if factor < _SLOW_FACTOR:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this processor computes {name} {factor:.0f} times slower than 32 bit; use --mixed_precision=no here"


def product_seconds(dtype: torch.dtype) -> float:
    """The time of a product of two (256, 256) matrices on the CPU, the best of three."""
    import torch  # noqa: PLC0415 - seconds to import, which the checks before a run do without

    matrix = torch.ones(_PROBE_SIDE, _PROBE_SIDE, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return best
