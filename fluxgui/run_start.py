"""Starts workers: one process for a run, and the queue's next ones as devices become free. No gradio."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Final

import psutil
import tomlkit
from filelock import FileLock
from tomlkit.exceptions import TOMLKitError

from fluxgui.run_crashes import CrashTeller
from fluxgui.vram import detect_gpu
from trainer.schema.folders import data_home, runs_dir
from trainer.schema.run_folder import RunFolder, list_runs, read_json, write_atomic
from trainer.schema.run_liveness import is_locked
from trainer.schema.run_queue import PROCESS_FILE, in_order, is_wanted
from trainer.schema.settings import with_token

logger = logging.getLogger(__name__)

PROGRAM_FOLDER: Final = Path(__file__).resolve().parents[1]
START_SECONDS: Final = 10.0
"""Starting the worker's process takes no longer than this."""
QUEUE_SECONDS: Final = 1.0


def start_worker(run: RunFolder) -> None:
    """Start training in `run` as a process of its own that outlives this one. Never through a shell."""
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS
    # By the same clock as the events'; what the system says about the start can be a second off.
    asked = time.time()
    with run.worker_log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "run", str(run.path)],
            cwd=PROGRAM_FOLDER,
            env={**with_token(os.environ), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=flags,
        )
    note: dict[str, float] = {"pid": process.pid, "asked": asked}
    with contextlib.suppress(psutil.Error):  # gone already
        note["started"] = psutil.Process(process.pid).create_time()
    write_atomic(run.path / PROCESS_FILE, json.dumps(note))
    # Only takes note of the end, so that no dead process is left in the system's table while the page lives.
    threading.Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()


def is_starting(run: RunFolder) -> bool:
    """Whether the process that was started for the run is there. It may not have been heard of yet."""
    try:
        process = json.loads((run.path / PROCESS_FILE).read_bytes())
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["started"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except FileNotFoundError:  # between the log's first byte and the note about the process
        with contextlib.suppress(OSError):
            return time.time() - run.worker_log.stat().st_mtime < START_SECONDS
        return False
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


def was_started_since(run: RunFolder, moment: float | None) -> bool:
    """Whether a process was started for the run that has not been heard of yet: it is still loading."""
    asked = read_json(run.path / PROCESS_FILE).get("asked")
    return moment is not None and isinstance(asked, (int, float)) and asked > moment and is_starting(run)


def waiting_runs() -> list[RunFolder]:
    """The runs that wait for a worker, the one whose turn is next first."""
    return in_order([run for run in list_runs(runs_dir()) if is_wanted(run) and not is_locked(run)])


def start_due() -> list[RunFolder]:
    """Start the runs whose turn it is: one for each device that no run uses. Gives those that were started."""
    folder = data_home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    # Two pages may be open on one data folder, and a handler may be at this while the queue's own thread is.
    with FileLock(str(folder / "queue.lock")):
        waiting = waiting_runs()
        if not waiting:
            return []
        at_work = [run for run in list_runs(runs_dir()) if is_locked(run) or (is_starting(run) and not is_wanted(run))]
        busy = {device_of(run) for run in at_work}
        started: list[RunFolder] = []
        for run in waiting:
            device = device_of(run)
            if device not in busy:
                start_worker(run)
                started.append(run)
                busy.add(device)
        return started


def device_of(run: RunFolder) -> str:
    """The kind of device that a run asks for: cuda, mps or cpu."""
    try:
        asked = _device_option(run.config_toml, run.config_toml.stat().st_mtime_ns)
    except OSError:
        asked = "auto"
    return _automatic_device() if asked == "auto" else asked


@lru_cache(maxsize=1024)
def _device_option(path: Path, _modified: int) -> str:
    try:
        values = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
    except (OSError, ValueError, TOMLKitError):
        return "auto"  # the worker will say what is wrong with it
    for table in (values, *(each for each in values.values() if isinstance(each, dict))):
        if isinstance(table.get("device"), str):
            return str(table["device"])
    return "auto"


@lru_cache
def _automatic_device() -> str:
    if detect_gpu() is not None:
        return "cuda"
    return "mps" if sys.platform == "darwin" else "cpu"


class QueueKeeper:
    """Starts the next run when one ends and tells of those that crash, for as long as the page's program runs.

    A browser is not needed.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="queue", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        teller = CrashTeller()
        while not self._ended.wait(QUEUE_SECONDS):
            try:
                start_due()
                teller.look()
            except OSError as error:
                # No room for a process, or the disk is gone: the runs go on waiting.
                logger.warning("the next run cannot be started: %s", error)
