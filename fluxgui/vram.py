"""How much memory the GPU has, asked from its driver: no torch."""

from __future__ import annotations

from dataclasses import dataclass

import pynvml


@dataclass(frozen=True)
class Gpu:
    name: str
    total_bytes: int

    @property
    def gigabytes(self) -> float:
        """As cards are sold: a "24 GB" card has about 24 * 2**30 bytes."""
        return round(self.total_bytes / 2**30, 1)


def detect_gpu() -> Gpu | None:
    """The first NVIDIA GPU, or None where there is none or no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return None
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return Gpu(name if isinstance(name, str) else name.decode("utf-8", errors="replace"), total)
