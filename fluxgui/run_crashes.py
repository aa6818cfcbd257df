"""Tells of trainers that ended without a word: the trainer sends what the settings ask for, but one that is killed cannot.

No gradio.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

from trainer.schema.events import EventReader
from trainer.schema.folders import runs_dir
from trainer.schema.run_folder import RunFolder, list_runs
from trainer.schema.run_liveness import is_locked
from trainer.schema.settings import read_settings

PROGRAM_FOLDER: Final = Path(__file__).resolve().parents[1]
BEAT_SECONDS: Final = 300.0
"""A heartbeat that is older is no reason to look whether the trainer is there."""


class CrashTeller:
    """Notes which runs have a trainer, and notifies of those that lose it without having said that they ended.

    Only of trainers that it has seen at work: what ended while the program was not there is old news.
    """

    def __init__(self) -> None:
        self._at_work: dict[str, RunFolder] = {}

    def look(self) -> list[RunFolder]:
        """The runs that have crashed since the last look; a notification of each is under way."""
        for run in list_runs(runs_dir()):
            if run.path.name not in self._at_work and _beats(run) and is_locked(run):
                self._at_work[run.path.name] = run
        crashed: list[RunFolder] = []
        for name, run in [*self._at_work.items()]:
            if not is_locked(run):
                del self._at_work[name]
                if run.path.exists() and not _said_its_end(run):
                    crashed.append(run)
                    _notify(run)
        return crashed


def _beats(run: RunFolder) -> bool:
    try:
        return time.time() - run.heartbeat_json.stat().st_mtime < BEAT_SECONDS
    except OSError:
        return False


def _said_its_end(run: RunFolder) -> bool:
    has_ended = False
    for event in EventReader(run.events_jsonl).read_new():
        if event.get("kind") in ("run_started", "run_finished"):
            has_ended = event["kind"] == "run_finished"
    return has_ended


def _notify(run: RunFolder) -> None:
    settings = read_settings()
    if not settings.notify_command and settings.notify_webhook is None:
        return
    with run.worker_log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "notify", f"--run={run.path}"],
            cwd=PROGRAM_FOLDER,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    threading.Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()
