"""A run on disk: its files, its lock, its heartbeat, the commands sent to it, and what all of that says about it.

The folder is the only thing that the interface and the worker share. Whoever makes a run writes `run.json`,
`config.toml`, `dataset.toml` and `sample_prompts.txt`, once; the worker writes everything else; commands are files that
the interface puts into `control/` and the worker moves to `control/done/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Protocol, cast

from filelock import FileLock, Timeout

from trainer.schema.base import UserError
from trainer.schema.events import SCHEMA_VERSION, read_last_event

START_REQUEST: Final = "start"
"""Value of `request` in run.json: whoever made the folder wants a worker to train in it."""

HEARTBEAT_SECONDS: Final = 2.0
FROZEN_SECONDS: Final = 60.0
"""A heartbeat older than this, with the lock still held, comes from a process that does not get to run."""

STUCK_SECONDS: Final[Mapping[str, float]] = {
    "check": 120.0,
    "text": 240.0,
    "latents": 240.0,
    "model": 900.0,
    "training": 600.0,
    "sampling": 600.0,
    "saving": 300.0,
}
"""How long each phase may go without progress. `model` is 24 GB from a disk that may be slow; a phase that is not
listed, such as waiting for the device, may take any time."""
SLOW_STEPS: Final = 10
"""Training may also go without progress for as long as this many of its steps take."""

_PHASE_WORDS: Final[Mapping[str, str]] = {
    "check": "checking files and pictures",
    "waiting": "waiting for another run to finish",
    "text": "caching captions",
    "latents": "caching pictures",
    "model": "loading the model",
    "training": "training",
    "sampling": "making samples",
    "saving": "saving",
}

_LOCK_WAIT_SECONDS: Final = 2.0
"""A worker waits this long for its lock, as somebody may be probing it at that moment."""
_PROBE_SECONDS: Final = 0.02
"""A probe tries for this long, as a probe of another process may hold the lock for an instant."""
_PROBE_TURN: Final = threading.Lock()
"""Probes of one process take turns, or on a busy machine one could take the other for a worker."""
_PROBE_POLL_SECONDS: Final = 0.004
_REPLACE_TRIES: Final = 6
_REPLACE_WAIT_SECONDS: Final = 0.02
_MAX_SLUG: Final = 40
RUN_STATE: Final = re.compile(r"step-(\d{6,})")
"""Names of the states that a run keeps to be resumed from, by the step after which they were saved."""
_COMMAND_FILE: Final = re.compile(r"(\d+)-([a-z][a-z_]*)\.json")

State = Literal["running", "paused", "stuck", "completed", "stopped", "failed", "queued", "crashed"]


# ---------------------------------------------------------------------------------------------------------- writing


def write_atomic(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write `path` so that it holds either its old content or all of `data`, whatever happens meanwhile.

    `durable` also waits for the disk. Text is written as UTF-8 with the line ends that it has.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(source: Path, target: Path) -> None:
    """`os.replace`, tried again for a moment: on Windows it fails while somebody else has the target open."""
    for attempt in range(_REPLACE_TRIES):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == _REPLACE_TRIES - 1:
                raise
            time.sleep(_REPLACE_WAIT_SECONDS * 2**attempt)


# ----------------------------------------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class Command:
    """Something that the interface asks of the worker. `id` is unique in its run, such as "0007-save"."""

    id: str
    name: str


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; its name is the run's id."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def config_toml(self) -> Path:
        return self.path / "config.toml"

    @property
    def dataset_toml(self) -> Path:
        return self.path / "dataset.toml"

    @property
    def sample_prompts_txt(self) -> Path:
        return self.path / "sample_prompts.txt"

    @property
    def control_dir(self) -> Path:
        return self.path / "control"

    @property
    def done_dir(self) -> Path:
        return self.control_dir / "done"

    @property
    def worker_lock(self) -> Path:
        return self.path / "worker.lock"

    @property
    def heartbeat_json(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def events_jsonl(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def worker_log(self) -> Path:
        return self.path / "worker.log"

    @property
    def samples_dir(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def state_dir(self) -> Path:
        return self.path / "state"

    @classmethod
    def create(
        cls,
        runs_dir: Path,
        name: str,
        *,
        config_toml: str,
        dataset_toml: str,
        sample_prompts: str,
        info: Mapping[str, object],
        clock: Callable[[], float] = time.time,
    ) -> RunFolder:
        """A new run below `runs_dir`, asked to start. It appears under its name only when it is whole.

        The id is made of the local time and `name`: "20260114-203112-mycat". `info` goes into run.json beside `name`,
        `created` and `request`, and wins over them.
        """
        created = clock()
        runs_dir.mkdir(parents=True, exist_ok=True)
        temporary = runs_dir / f".new-{uuid.uuid4().hex}"
        run = cls(temporary)
        described: dict[str, object] = {
            "schema": SCHEMA_VERSION,
            "name": name,
            "created": created,
            "request": START_REQUEST,
            **info,
        }
        try:
            temporary.mkdir()
            for folder in (run.control_dir, run.done_dir, run.samples_dir, run.checkpoints_dir):
                folder.mkdir()
            write_atomic(run.config_toml, config_toml)
            write_atomic(run.dataset_toml, dataset_toml)
            write_atomic(run.sample_prompts_txt, sample_prompts)
            write_atomic(run.run_json, json.dumps(described, ensure_ascii=False, indent=2) + "\n")
            run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(created))}-{_slug(name)}"
            return cls(_rename_to_free_name(temporary, run_id))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def read_info(self) -> dict[str, object]:
        """What run.json says; empty when it cannot be read."""
        return _read_json(self.run_json)

    def send_command(self, name: str) -> str:
        """Ask the worker for `name` (stop, save, sample, pause, resume). Returns the command's id."""
        if not re.fullmatch(r"[a-z][a-z_]*", name):
            raise ValueError(f"{name!r} cannot be a command's name")
        self.done_dir.mkdir(parents=True, exist_ok=True)
        numbers = [int(match[1]) for match in (*_command_files(self.control_dir), *_command_files(self.done_dir))]
        command_id = f"{max(numbers, default=0) + 1:04d}-{name}"
        write_atomic(
            self.control_dir / f"{command_id}.json",
            json.dumps({"id": command_id, "name": name, "time": time.time()}) + "\n",
        )
        return command_id

    def take_commands(self) -> list[Command]:
        """The commands that wait, oldest first. They go on waiting until `finish_command`."""
        found = sorted(_command_files(self.control_dir), key=lambda match: (int(match[1]), match[0]))
        return [Command(match[0].removesuffix(".json"), match[2]) for match in found]

    def finish_command(self, command: Command) -> None:
        """Move the command to the done ones."""
        self.done_dir.mkdir(parents=True, exist_ok=True)
        file = f"{command.id}.json"
        with contextlib.suppress(FileNotFoundError):  # somebody withdrew it
            _replace(self.control_dir / file, self.done_dir / file)


def newest_state_step(run: RunFolder) -> int | None:
    """The step after which the run would go on, by the names of the states that it keeps; None without a state."""
    try:
        names = [entry.name for entry in os.scandir(run.state_dir) if entry.is_dir()]
    except OSError:
        return None
    return max((int(match[1]) for match in map(RUN_STATE.fullmatch, names) if match is not None), default=None)


def list_runs(runs_dir: Path) -> list[RunFolder]:
    """The runs below `runs_dir`, oldest first; none when there is no such folder."""
    try:
        entries = sorted(runs_dir.iterdir(), key=lambda path: path.name)
    except OSError:
        return []
    runs = (RunFolder(path) for path in entries if not path.name.startswith("."))
    return [run for run in runs if run.run_json.is_file()]


def _command_files(folder: Path) -> list[re.Match[str]]:
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []
    return [match for match in map(_COMMAND_FILE.fullmatch, names) if match is not None]


def _rename_to_free_name(temporary: Path, run_id: str) -> Path:
    for number in count(1):
        target = temporary.with_name(run_id if number == 1 else f"{run_id}-{number}")
        if target.exists():
            continue
        try:
            temporary.rename(target)
        except OSError:
            if target.exists():
                continue  # somebody else was faster
            raise
        return target
    raise AssertionError("a free name is found sooner or later")


def _slug(name: str) -> str:
    """`name` as part of a folder's name on every system: lower-case ASCII letters, digits and dashes; never empty."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:_MAX_SLUG].rstrip("-") or "run"


def _read_json(path: Path) -> dict[str, object]:
    try:
        parsed: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}


# ------------------------------------------------------------------------------------------------- lock, heartbeat


class WorkerLock:
    """Held by the one worker of a run for its lifetime; the system frees it however the worker dies."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._lock = FileLock(str(run.worker_lock))

    def acquire(self) -> None:
        """Raises `UserError` when another worker has the run."""
        try:
            self._lock.acquire(timeout=_LOCK_WAIT_SECONDS)
        except Timeout:
            raise UserError(
                "another worker already trains in this run", str(self._run.path), "Stop it or wait for its end."
            ) from None

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> WorkerLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(run: RunFolder) -> bool:
    """Whether a worker has the run. Never disturbs it: the lock is tried for an instant and given back at once."""
    if not run.worker_lock.is_file():
        return False  # no worker was ever here, or the folder is gone; trying would make them anew
    lock = FileLock(str(run.worker_lock))
    with _PROBE_TURN:
        try:
            lock.acquire(timeout=_PROBE_SECONDS, poll_interval=_PROBE_POLL_SECONDS)
        except Timeout:
            return True
        except OSError:
            return False  # the folder vanished meanwhile
        lock.release()
    return False


class Heartbeat:
    """A thread that says every two seconds that the process lives, and when it last got on with its work.

    heartbeat.json holds `pid`, `time` of writing, `phase`, `progress` in words, and `progress_time`, when `update` was
    last called.
    """

    def __init__(self, run: RunFolder, clock: Callable[[], float] = time.time) -> None:
        self._path = run.heartbeat_json
        self._clock = clock
        self._lock = threading.Lock()
        self._phase = ""
        self._progress = ""
        self._progress_time = clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def update(self, *, phase: str | None = None, progress: str | None = None) -> None:
        """Note that work goes on. A new phase begins without progress. Costs next to nothing: nothing is written here."""
        with self._lock:
            if phase is not None:
                self._phase, self._progress = phase, ""
            if progress is not None:
                self._progress = progress
            self._progress_time = self._clock()

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            content = {
                "pid": os.getpid(),
                "time": self._clock(),
                "phase": self._phase,
                "progress": self._progress,
                "progress_time": self._progress_time,
            }
        # A full disk is the business of what has to be written; the next beat tries again.
        with contextlib.suppress(OSError):
            write_atomic(self._path, json.dumps(content) + "\n", durable=False)


# ------------------------------------------------------------------------------------------------------------ probe


class RunFacts(Protocol):
    """What `probe` needs of the state that a run's events add up to. `num_seen` is the number of events."""

    @property
    def num_seen(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def is_paused(self) -> bool: ...
    @property
    def step_seconds(self) -> float | None: ...
    @property
    def outcome(self) -> Literal["completed", "stopped", "failed"] | None: ...


@dataclass(frozen=True)
class RunStatus:
    """How a run is. `detail` is a sentence for a person, empty where the state says it all."""

    state: State
    detail: str = ""


def probe(run: RunFolder, facts: RunFacts, clock: Callable[[], float] = time.time) -> RunStatus:
    """How the run is now: `facts` say how far it came, the lock and the heartbeat whether somebody goes on with it."""
    if is_locked(run):
        return _status_alive(run, facts, clock())
    outcome = facts.outcome or _outcome_written_since(run)
    if outcome is not None:
        return RunStatus(outcome)
    if facts.num_seen == 0 and not run.heartbeat_json.exists():
        if run.read_info().get("request") == START_REQUEST:
            return RunStatus("queued", "Waits for a trainer.")
        return RunStatus("stopped", "It was not asked to start.")
    phase = _PHASE_WORDS.get(facts.phase, facts.phase) or "starting"
    return RunStatus("crashed", f"The trainer ended without a word while {phase}.")


def _status_alive(run: RunFolder, facts: RunFacts, now: float) -> RunStatus:
    beat = _read_json(run.heartbeat_json)
    phase = str(beat.get("phase") or facts.phase)
    words = _PHASE_WORDS.get(phase, phase) or "starting"
    written, progressed = _seconds_since(now, beat.get("time")), _seconds_since(now, beat.get("progress_time"))
    if written is not None and written > FROZEN_SECONDS:
        return RunStatus("stuck", f"The trainer has not moved for {_duration(written)} while {words}.")
    if facts.is_paused:
        return RunStatus("paused")
    limit = STUCK_SECONDS.get(phase)
    if limit is not None and phase == "training":
        limit = max(limit, SLOW_STEPS * (facts.step_seconds or 0.0))
    if limit is not None and progressed is not None and progressed > limit:
        return RunStatus("stuck", f"No progress for {_duration(progressed)} while {words}.")
    return RunStatus("running")


def _outcome_written_since(run: RunFolder) -> Literal["completed", "stopped", "failed"] | None:
    """The outcome of a worker that ended between the reading of the facts and the look at its lock."""
    last = read_last_event(run.events_jsonl) or {}
    if last.get("kind") != "run_finished":
        return None
    outcomes: tuple[Literal["completed", "stopped", "failed"], ...] = ("completed", "stopped", "failed")
    return next((outcome for outcome in outcomes if outcome == last.get("outcome")), None)


def _seconds_since(now: float, moment: object) -> float | None:
    return max(0.0, now - moment) if isinstance(moment, (int, float)) else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
