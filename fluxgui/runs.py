"""Runs on disk: start, list, probe, command, read. The folders are the truth; what is kept here is only a cache of them.

No gradio.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import psutil

from fluxgui.run_state import RunState, fold
from trainer.schema.events import EventReader
from trainer.schema.folders import runs_dir
from trainer.schema.run_folder import RunFolder, RunStatus, list_runs, probe, write_atomic

PROGRAM_FOLDER: Final = Path(__file__).resolve().parents[1]
START_SECONDS: Final = 10.0
"""Starting the worker's process takes no longer than this."""
LOG_TAIL_BYTES: Final = 16_000

CommandName = Literal["stop", "save", "sample", "pause", "resume"]
FileKind = Literal["samples", "checkpoints", "log"]


@dataclass(frozen=True)
class RunView:
    """One run at one moment."""

    run: RunFolder
    name: str
    status: RunStatus
    state: RunState

    @property
    def run_id(self) -> str:
        return self.run.path.name

    @property
    def is_live(self) -> bool:
        """Whether something may still change without anyone asking for it."""
        return self.status.state in ("queued", "running", "paused", "stuck")


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
        return RunView(run, name, _status(run, state), state)

    def look_at_all(self) -> list[RunView]:
        """Newest first."""
        return [self.look(run) for run in sorted(list_runs(runs_dir()), key=lambda run: run.path.name, reverse=True)]


def find_run(run_id: str | None) -> RunFolder | None:
    """The run of that id, or None. An id never leads out of the runs folder: it is only compared with what is there."""
    return next((run for run in list_runs(runs_dir()) if run.path.name == run_id), None)


def run_name(run: RunFolder) -> str:
    name = run.read_info().get("name")
    return name if isinstance(name, str) and name else run.path.name


def start_worker(run: RunFolder) -> None:
    """Start training in `run` as a process of its own that outlives this one. Never through a shell."""
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS
    with run.worker_log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "run", str(run.path)],
            cwd=PROGRAM_FOLDER,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=flags,
        )
    with contextlib.suppress(psutil.Error):  # gone already
        write_atomic(_process_json(run), json.dumps({"pid": process.pid, "started": _started(process.pid)}))
    # Only takes note of the end, so that no dead process is left in the system's table while the page lives.
    threading.Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()


def create_and_start(
    name: str, *, config_toml: str, dataset_toml: str, sample_prompts: str, info: Mapping[str, object]
) -> RunFolder:
    run = RunFolder.create(
        runs_dir(),
        name,
        config_toml=config_toml,
        dataset_toml=dataset_toml,
        sample_prompts=sample_prompts,
        info={"name": name, **info},
    )
    start_worker(run)
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


def send(run: RunFolder, command: CommandName) -> None:
    run.send_command(command)


def pending_commands(run: RunFolder) -> list[str]:
    """Names of the commands that the worker has not taken yet, oldest first."""
    try:
        names = sorted(path.stem for path in run.control_dir.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    return [name.rpartition("-")[2] for name in names]


def read_log_tail(run: RunFolder) -> str:
    """The last lines of the worker's log; progress bars that overwrite themselves count as one line."""
    try:
        with run.worker_log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - LOG_TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    if size > LOG_TAIL_BYTES:
        lines = lines[1:]  # the first one is cut somewhere in its middle
    return "\n".join(lines).strip("\n")


def served_file(view: RunView, kind: str, name: str) -> Path | None:
    """The file a link of the run's page leads to: one that the run's own events name, or its log. Else None."""
    if kind == "log":
        path = view.run.worker_log
        return path if name == path.name and path.is_file() else None
    if kind == "samples":
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
    suffixes = {".png", ".jpg", ".jpeg", ".webp"} if kind == "samples" else {".safetensors"}
    return path.suffix.lower() in suffixes and path.resolve().suffix.lower() in suffixes


def _status(run: RunFolder, state: RunState) -> RunStatus:
    status = probe(run, state)
    if status.state != "queued" or not run.worker_log.exists():
        return status
    # Asked to start, yet nothing was heard: either it is still loading, or it died before it could say so.
    if _is_starting(run):
        return RunStatus("queued", "The trainer is being started.")
    return RunStatus("crashed", "The trainer did not start.")


def _process_json(run: RunFolder) -> Path:
    """Which process was started for the run; read only until that process speaks for itself."""
    return run.path / "process.json"


def _started(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _is_starting(run: RunFolder) -> bool:
    try:
        process = json.loads(_process_json(run).read_bytes())
        same = abs(_started(process["pid"]) - process["started"]) < 1
        return same and psutil.Process(process["pid"]).status() != psutil.STATUS_ZOMBIE
    except FileNotFoundError:  # between the log's first byte and the note about the process
        return time.time() - run.worker_log.stat().st_mtime < START_SECONDS
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False
