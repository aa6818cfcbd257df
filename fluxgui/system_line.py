"""How busy this machine is while a run trains: GPU, memory, temperature, disk. Sampled by a thread; no gradio, no torch."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

import psutil
import pynvml

from fluxgui.language import say
from trainer.schema.folders import data_home

SAMPLE_SECONDS: Final = 2.0
KEPT: Final = 450
"""Fifteen minutes."""
MAX_DRAWN: Final = 150
WIDTH, HEIGHT = 300.0, 40.0
FULL: Final = 0.95
"""From this share on a figure is marked."""


@dataclass(frozen=True)
class Load:
    """The machine at one moment; sizes in bytes, shares in 0 to 1. What there is no GPU for is None."""

    time: float
    cpu_share: float
    host_used: int
    host_total: int
    disk_free: int
    gpu_share: float | None = None
    vram_used: int | None = None
    vram_total: int | None = None
    celsius: int | None = None


class LoadSampler:
    """Keeps the last minutes of the machine's load. It costs a few system calls every two seconds."""

    def __init__(self) -> None:
        self._loads: deque[Load] = deque(maxlen=KEPT)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def loads(self) -> list[Load]:
        """Oldest first."""
        return list(self._loads)

    def _sample(self) -> None:
        psutil.cpu_percent()  # the first answer has nothing to compare with
        has_gpu = _start_nvml()
        while not self._ended.wait(SAMPLE_SECONDS):
            self._loads.append(read_load(has_gpu=has_gpu))
        if has_gpu:
            pynvml.nvmlShutdown()


def _start_nvml() -> bool:
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        return False


def read_load(*, has_gpu: bool) -> Load:
    """The load now. `has_gpu` says that NVML was started and knows a device."""
    memory = psutil.virtual_memory()
    gpu_share = vram_used = vram_total = celsius = None
    if has_gpu:
        # A driver may not tell everything about every card.
        with contextlib.suppress(pynvml.NVMLError):
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
            facts = pynvml.nvmlDeviceGetMemoryInfo(device)
            vram_used, vram_total = int(facts.used), int(facts.total)
            gpu_share = int(pynvml.nvmlDeviceGetUtilizationRates(device).gpu) / 100
            celsius = int(pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU))
    return Load(
        time=time.time(),
        cpu_share=psutil.cpu_percent() / 100,
        host_used=memory.total - memory.available,
        host_total=memory.total,
        disk_free=_disk_free(data_home()),
        gpu_share=gpu_share,
        vram_used=vram_used,
        vram_total=vram_total,
        celsius=celsius,
    )


def _disk_free(folder: Path) -> int:
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


def system_line(loads: Sequence[Load]) -> str:
    """The newest figures with a small chart each; empty while there are none."""
    if not loads:
        return ""
    now = loads[-1]
    figures: list[str] = []
    if now.gpu_share is not None:
        figures.append(_figure("GPU", _percent(now.gpu_share), [load.gpu_share for load in loads]))
    if now.vram_used is not None and now.vram_total:
        shares = [_share(load.vram_used, load.vram_total) for load in loads]
        figures.append(_figure(say("runs.vram"), _of(now.vram_used, now.vram_total), shares))
    if now.celsius is not None:
        degrees = [None if load.celsius is None else load.celsius / 100 for load in loads]
        figures.append(_figure(say("runs.temperature"), f"{now.celsius} °C", degrees))
    figures.append(_figure(say("runs.cpu"), _percent(now.cpu_share), [load.cpu_share for load in loads]))
    hosts = [_share(load.host_used, load.host_total) for load in loads]
    figures.append(_figure(say("runs.host"), _of(now.host_used, now.host_total), hosts))
    figures.append(f"<div><dt>{escape(say('runs.disk'))}</dt><dd>{now.disk_free / 2**30:.0f} GiB</dd></div>")
    return f'<dl class="facts system">{"".join(figures)}</dl>'


def _figure(name: str, text: str, shares: Sequence[float | None]) -> str:
    known = [min(max(share, 0.0), 1.0) for share in shares if share is not None]
    shown = known[:: -max(1, -(-len(known) // MAX_DRAWN))][::-1]
    step = WIDTH / max(len(shown) - 1, 1)
    path = " ".join(f"{number * step:.0f},{HEIGHT * (1 - share):.0f}" for number, share in enumerate(shown))
    full = ' class="full"' if known and known[-1] >= FULL else ""
    return (
        f"<div{full}><dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{path}"/></svg></div>'
    )


def _share(used: int | None, total: int | None) -> float | None:
    return used / total if used is not None and total else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _of(used: int, total: int) -> str:
    return f"{used / 2**30:.1f} / {total / 2**30:.1f} GiB"
