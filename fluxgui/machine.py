"""This machine as the Settings page tells it: versions, devices, and what is wrong with the set-up. No torch, no gradio."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

import psutil
import pynvml

from fluxgui.language import say
from fluxgui.models import KINDS, PROGRAM_FOLDER, found_models
from trainer.schema.folders import data_home, datasets_dir, models_dir, runs_dir
from trainer.schema.settings import hub_token

GIB: Final = 2**30
PACKAGES: Final = ("torch", "transformers", "safetensors", "accelerate", "bitsandbytes", "gradio", "huggingface_hub")
NEEDED: Final = ("torch", "transformers", "safetensors", "accelerate", "gradio", "pillow", "tomlkit", "filelock")
MIN_PYTHON, LAST_PYTHON = (3, 10), (3, 13)
FREE_BYTES: Final = 40 * GIB
"""The four model files take about 34 GB."""
HOST_BYTES: Final = 30 * GIB
MIN_VRAM_BYTES: Final = 7.5 * GIB
# The first driver for CUDA 12 (Linux; that for Windows is 527.41, which the same number lets through).
MIN_DRIVER: Final = 525

TRY_SECONDS: Final = 60

Verdict = Literal["good", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what to do about it where it is not good."""

    verdict: Verdict
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Device:
    name: str
    total_bytes: int
    free_bytes: int


def try_out_notifications() -> str | None:
    """Let the trainer's program do what it does at the end of a run; gives what did not work."""
    command = [sys.executable, "-m", "trainer", "notify"]
    try:
        tried = subprocess.run(
            command, cwd=PROGRAM_FOLDER, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TRY_SECONDS
        )
    except subprocess.TimeoutExpired:
        return say("settings.no_answer")
    return (tried.stderr.strip() or say("settings.no_answer")) if tried.returncode else None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_devices() -> tuple[str | None, list[Device]]:
    """The driver's version, None without a driver, and its devices."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        devices: list[Device] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            devices.append(Device(_text(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))
    except pynvml.NVMLError:
        return None, []
    finally:
        pynvml.nvmlShutdown()
    return driver, devices


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", errors="replace")


def about() -> list[tuple[str, str]]:
    """Facts about the machine, as they are at this moment: name and value."""
    driver, devices = nvidia_devices()
    memory = psutil.virtual_memory()
    facts = [
        (say("settings.fact_system"), f"{platform.system()} {platform.release()}, {platform.machine()}"),
        (say("settings.fact_python"), platform.python_version()),
        *((package, installed(package) or say("settings.not_installed")) for package in PACKAGES),
        (say("settings.fact_driver"), driver or say("settings.no_driver")),
    ]
    facts += [
        (
            say("settings.fact_device"),
            say("settings.memory", name=each.name, total=_gb(each.total_bytes), free=_gb(each.free_bytes)),
        )
        for each in devices
    ]
    if not devices:
        facts.append((say("settings.fact_device"), say("settings.no_device", cores=os.cpu_count() or 1)))
    host = say("settings.memory", name="", total=_gb(memory.total), free=_gb(memory.available)).strip()
    disk = shutil.disk_usage(_existing(data_home()))
    return [
        *facts,
        (say("settings.fact_memory"), host),
        (
            say("settings.fact_disk"),
            say("settings.memory", name="", total=_gb(disk.total), free=_gb(disk.free)).strip(),
        ),
        (say("settings.fact_home"), str(data_home())),
    ]


def examine() -> list[Finding]:
    """What keeps this machine from training, or will."""
    return [*_python(), *_packages(), *_gpu(), *_memory(), *_folders(), *_models()]


def _python() -> list[Finding]:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if MIN_PYTHON <= sys.version_info[:2] <= LAST_PYTHON:
        return [Finding("good", f"Python {here}")]
    return [Finding("warn", f"Python {here}", say("settings.fix_python"))]


def _packages() -> list[Finding]:
    missing = [package for package in NEEDED if installed(package) is None]
    if missing:
        return [Finding("bad", say("settings.missing", names=", ".join(missing)), say("settings.fix_setup"))]
    return [Finding("good", say("settings.packages_there"))]


def _gpu() -> list[Finding]:
    driver, devices = nvidia_devices()
    build = installed("torch") or ""
    if driver is None or not devices:
        if sys.platform == "darwin":
            return [Finding("warn", say("settings.mac"), say("settings.fix_mac"))]
        return [Finding("warn", say("settings.no_gpu"), say("settings.fix_no_gpu"))]
    found = [Finding("good", say("settings.gpu_there", name=devices[0].name, driver=driver))]
    if "+cpu" in build:
        found.append(Finding("bad", say("settings.cpu_torch", version=build), say("settings.fix_cpu_torch")))
    number = driver.partition(".")[0]
    if number.isdigit() and int(number) < MIN_DRIVER:
        found.append(Finding("bad", say("settings.old_driver", driver=driver), say("settings.fix_driver")))
    largest = max(device.total_bytes for device in devices)
    if largest < MIN_VRAM_BYTES:
        found.append(Finding("warn", say("settings.little_vram", size=_gb(largest)), say("settings.fix_vram")))
    busy = devices[0].total_bytes - devices[0].free_bytes
    if busy > 2 * GIB:
        found.append(Finding("warn", say("settings.busy_gpu", size=_gb(busy)), say("settings.fix_busy_gpu")))
    if sys.platform != "darwin" and installed("bitsandbytes") is None:
        found.append(Finding("warn", say("settings.no_bitsandbytes"), say("settings.fix_setup")))
    return found


def _memory() -> list[Finding]:
    total = psutil.virtual_memory().total
    if total < HOST_BYTES:
        return [Finding("warn", say("settings.little_memory", size=_gb(total)), say("settings.fix_memory"))]
    return [Finding("good", say("settings.enough_memory", size=_gb(total)))]


def _folders() -> list[Finding]:
    found: list[Finding] = []
    for folder in (models_dir(), datasets_dir(), runs_dir()):
        problem = _not_writable(folder)
        if problem is not None:
            found.append(
                Finding("bad", say("settings.no_writing", folder=folder, reason=problem), say("settings.fix_writing"))
            )
    free = shutil.disk_usage(_existing(models_dir())).free
    if free < FREE_BYTES:
        found.append(Finding("warn", say("settings.little_disk", size=_gb(free)), say("settings.fix_disk")))
    return found or [Finding("good", say("settings.folders_good", size=_gb(free)))]


def _not_writable(folder: Path) -> str | None:
    """Why nothing can be written there; a folder that is not made yet is tried in the nearest one above."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _models() -> list[Finding]:
    found = found_models(models_dir())
    missing = [name for name in KINDS if name not in found]
    token = [] if hub_token() else [Finding("warn", say("settings.no_token"), say("settings.fix_token"))]
    if missing:
        names = ", ".join(say(f"settings.file_{name}") for name in missing)
        return [Finding("warn", say("settings.models_missing", names=names), say("settings.fix_models")), *token]
    return [Finding("good", say("settings.models_there"))]


def _existing(path: Path) -> Path:
    """`path` or the nearest folder above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GB"
