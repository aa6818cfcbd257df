"""A run on disk: its files and the commands sent to it. `run_liveness` and `run_probe` say how it is.

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
import time
import unicodedata
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, cast

from trainer.schema.events import SCHEMA_VERSION

START_REQUEST: Final = "start"
"""Value of `request` in run.json: whoever made the folder wants a worker to train in it."""

_REPLACE_TRIES: Final = 6
_REPLACE_WAIT_SECONDS: Final = 0.02
_MAX_SLUG: Final = 40
RUN_STATE: Final = re.compile(r"step-(\d{6,})")
"""Names of the states that a run keeps to be resumed from, by the step after which they were saved."""
_COMMAND_FILE: Final = re.compile(r"(\d+)-([a-z][a-z_]*)\.json")


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
        return read_json(self.run_json)

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


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty when there is none or it cannot be read."""
    try:
        parsed: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}


def numbered_entries(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """What lies in `folder` under names that match, by the number in the name; nothing where there is no folder."""
    try:
        entries = list(folder.iterdir())
    except OSError:
        return []
    found = ((pattern.fullmatch(entry.name), entry) for entry in entries)
    return sorted((int(match[1]), entry) for match, entry in found if match is not None)
