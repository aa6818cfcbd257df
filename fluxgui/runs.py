"""Runs on disk: start, list, probe, command, read. The folders are the truth; what is kept here is only a cache of them.

No gradio.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fluxgui.run_start import is_starting, start_due, was_started_since
from fluxgui.run_state import RunState, fold
from trainer.schema.base import UserError
from trainer.schema.events import EventReader
from trainer.schema.folders import bin_dir, runs_dir
from trainer.schema.run_folder import (
    RunFolder,
    list_runs,
    newest_state_step,
    write_atomic,
)
from trainer.schema.run_liveness import is_locked
from trainer.schema.run_probe import RunStatus, probe
from trainer.schema.run_queue import ask_for_start, is_wanted, withdraw

LOG_TAIL_BYTES: Final = 16_000
LONG_TAIL_BYTES: Final = 256_000
"""Enough of a log to find warnings in."""
NOTES_FILE: Final = "notes.txt"
STARTING: Final = RunStatus("starting", "The trainer is being started.")

CommandName = Literal["stop", "save", "sample", "pause", "resume"]


@dataclass(frozen=True)
class RunView:
    """One run at one moment."""

    run: RunFolder
    name: str
    status: RunStatus
    state: RunState
    notes: str = ""

    @property
    def run_id(self) -> str:
        return self.run.path.name

    @property
    def can_resume(self) -> bool:
        """Whether the run ended before its last step and can go on in its folder."""
        return self.status.state in ("stopped", "crashed", "failed")

    @property
    def is_live(self) -> bool:
        """Whether something may still change without anyone asking for it."""
        return self.status.state in ("queued", "starting", "running", "paused", "stuck")


class RunWatcher:
    """Folds each run's events once, however many pages look: every look reads only what was added since."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[EventReader, RunState, str]] = {}

    def look(self, run: RunFolder) -> RunView:
        with self._lock:
            reader, state, name = self._known.get(run.path) or (EventReader(run.events_jsonl), RunState(), "")
            state = fold(state, reader.read_new())
            name = name or run_name(run)
            self._known[run.path] = (reader, state, name)
        return RunView(run, name, _status(run, state), state, read_notes(run))

    def forget(self, run: RunFolder) -> None:
        """Drop what is known of a run whose folder is gone."""
        with self._lock:
            self._known.pop(run.path, None)

    def look_at_all(self) -> list[RunView]:
        """Newest first."""
        return [self.look(run) for run in sorted(list_runs(runs_dir()), key=lambda run: run.path.name, reverse=True)]


def read_notes(run: RunFolder) -> str:
    """What the user wrote about the run."""
    try:
        return (run.path / NOTES_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def write_notes(run: RunFolder, text: str) -> None:
    """Keep the user's notes in the run's folder. Raises `OSError`."""
    write_atomic(run.path / NOTES_FILE, text)


def find_run(run_id: str | None) -> RunFolder | None:
    """The run of that id, or None. An id never leads out of the runs folder: it is only compared with what is there."""
    return next((run for run in list_runs(runs_dir()) if run.path.name == run_id), None)


def run_name(run: RunFolder) -> str:
    name = run.read_info().get("name")
    return name if isinstance(name, str) and name else run.path.name


def create_and_start(
    name: str, *, config_toml: str, dataset_toml: str, sample_prompts: str, info: Mapping[str, object]
) -> RunFolder:
    """A new run at the end of the queue. It starts at once when its device is free."""
    run = RunFolder.create(
        runs_dir(),
        name,
        config_toml=config_toml,
        dataset_toml=dataset_toml,
        sample_prompts=sample_prompts,
        info={"name": name, **info},
    )
    start_due()
    return run


def start_again(run: RunFolder) -> RunFolder:
    """A new run with the same settings, from the beginning."""
    return create_and_start(
        run_name(run),
        config_toml=run.config_toml.read_text(encoding="utf-8"),
        dataset_toml=run.dataset_toml.read_text(encoding="utf-8"),
        sample_prompts=run.sample_prompts_txt.read_text(encoding="utf-8"),
        info={"parent": run.path.name},
    )


def resume(run: RunFolder) -> None:
    """Ask for a worker in a run that ended: it goes on from the newest state in the folder, or from the beginning.

    It starts at once when its device is free. Raises `UserError` when one is at work there already.
    """
    if is_locked(run):
        raise UserError("a trainer is already at work in this run", run.path.name)
    ask_for_start(run)
    start_due()


@dataclass(frozen=True)
class Contents:
    """What a run's folder holds."""

    num_checkpoints: int
    num_samples: int
    has_state: bool
    num_bytes: int


def contents(run: RunFolder) -> Contents:
    """Counts the files in the run's folder."""
    num_bytes = 0
    for path in run.path.rglob("*"):
        with contextlib.suppress(OSError):  # gone since it was listed
            num_bytes += path.stat().st_size if path.is_file() else 0
    return Contents(
        num_checkpoints=sum(1 for _ in run.checkpoints_dir.glob("*.safetensors")),
        num_samples=sum(1 for _ in run.samples_dir.glob("*.*")),
        has_state=newest_state_step(run) is not None,
        num_bytes=num_bytes,
    )


def delete_run(run: RunFolder) -> Path:
    """Move the run's folder into the bin. Returns where it lies now.

    Raises `UserError` while a worker is at work there, or when the system does not let the folder go.
    """
    if is_locked(run):
        raise UserError("this run is at work", run.path.name, "Stop it first.")
    target = bin_dir() / run.path.name
    number = 1
    while target.exists():
        number += 1
        target = bin_dir() / f"{run.path.name}-{number}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Across devices this copies; within one the folder only gets another name.
        shutil.move(run.path, target)
    except OSError as error:
        raise UserError(f"the run cannot be moved to the bin: {error.strerror or error}", str(run.path)) from error
    return target


def send(run: RunFolder, command: CommandName) -> None:
    """Ask the worker for something. A run that still waits for one has none: to stop it is to take it out of the queue."""
    if command == "stop" and is_wanted(run) and not is_locked(run):
        withdraw(run)
    else:
        run.send_command(command)


def pending_commands(run: RunFolder) -> list[str]:
    """Names of the commands that the worker has not taken yet, oldest first."""
    try:
        names = sorted(path.stem for path in run.control_dir.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    return [name.rpartition("-")[2] for name in names]


def read_log_tail(run: RunFolder, num_bytes: int = LOG_TAIL_BYTES) -> str:
    """The last lines of the worker's log; progress bars that overwrite themselves count as one line."""
    try:
        with run.worker_log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - num_bytes))
            text = log.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    if size > num_bytes:
        lines = lines[1:]  # the first one is cut somewhere in its middle
    return "\n".join(lines).strip("\n")


def served_file(view: RunView, kind: str, name: str) -> Path | None:
    """The file a link of the run's page leads to: one that the run's own events name, or its log. Else None."""
    if kind == "log":
        path = view.run.worker_log
        return path if name == path.name and path.is_file() else None
    if kind in ("samples", "thumbs"):
        named = [sample.path for sample in view.state.samples]
    elif kind == "checkpoints":
        named = [checkpoint.path for checkpoint in view.state.checkpoints]
    else:
        return None
    for entry in reversed(named):
        path = view.run.path / entry
        if path.name == name and path.is_file() and _has_expected_type(kind, path):
            return path
    return None


def _has_expected_type(kind: str, path: Path) -> bool:
    suffixes = {".png", ".jpg", ".jpeg", ".webp"} if kind != "checkpoints" else {".safetensors"}
    return path.suffix.lower() in suffixes and path.resolve().suffix.lower() in suffixes


def _status(run: RunFolder, state: RunState) -> RunStatus:
    status = probe(run, state)
    if status.state not in ("stopped", "crashed", "failed", "completed"):
        return status
    if was_started_since(run, state.last_event_at):
        return STARTING
    if state.num_seen or run.heartbeat_json.exists() or not run.worker_log.exists():
        return status
    # Started, yet nothing was heard: either it is still loading, or it died before it could say so.
    return STARTING if is_starting(run) else RunStatus("crashed", "The trainer did not start.")
