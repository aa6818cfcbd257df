"""Background jobs: each is a process of its own with a folder in `jobs/`. Start, look, list, cancel. No gradio.

What runs as a job says how far it is through `trainer.schema.job_folder.JobReporter`; a command that knows nothing of
that works too, then only its end and its log are seen. The folders are the truth: nothing is kept in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, cast

import psutil

from trainer.schema.events import EventReader
from trainer.schema.folders import data_home
from trainer.schema.job_folder import JobFolder
from trainer.schema.run_folder import write_atomic

PROGRAM_FOLDER: Final = Path(__file__).resolve().parents[1]
START_SECONDS: Final = 10.0
KEPT_JOBS: Final = 30
"""Of each kind so many ended jobs are kept; older ones are removed when a new one starts."""
LOG_TAIL_BYTES: Final = 8_000

JobState = Literal["starting", "running", "completed", "cancelled", "failed", "crashed"]


@dataclass(frozen=True)
class JobView:
    """One job at one moment. `results` are the facts of its `result` events, with `path` made absolute."""

    job: JobFolder
    kind: str
    title: str
    subject: Mapping[str, object]
    created: float
    state: JobState
    done: float = 0.0
    total: float = 0.0
    text: str = ""
    results: tuple[Mapping[str, object], ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""
    updated: float = field(default=0.0)

    @property
    def job_id(self) -> str:
        return self.job.path.name

    @property
    def is_live(self) -> bool:
        return self.state in ("starting", "running")


def jobs_dir() -> Path:
    return data_home() / "jobs"


def start_job(
    kind: str,
    title: str,
    trainer_arguments: Sequence[str],
    *,
    subject: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> JobFolder:
    """Start `python -m trainer ARGUMENTS` as a job of its own that outlives this process. Never through a shell.

    In an argument, `{job}` stands for the job's folder: `["generate", "--job_dir={job}", "--output_dir={job}/output"]`.
    `kind` is a word such as "try"; `title` is what the page calls it; `subject` is kept for whoever started it. `files`
    are written into the folder first. `environment` is handed to the process only and written nowhere: it is the place
    for a token.
    """
    created = time.time()
    jobs_dir().mkdir(parents=True, exist_ok=True)
    remove_old_jobs(kind)
    job = JobFolder(
        jobs_dir() / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(created))}-{kind}-{uuid.uuid4().hex[:6]}"
    )
    job.output_dir.mkdir(parents=True)
    arguments = [argument.replace("{job}", str(job.path)) for argument in trainer_arguments]
    for name, text in (files or {}).items():
        write_atomic(job.path / name, text)
    described = {"kind": kind, "title": title, "created": created, "subject": subject or {}, "arguments": arguments}
    write_atomic(job.job_json, json.dumps(described, ensure_ascii=False, indent=1))
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *arguments],
            cwd=PROGRAM_FOLDER,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=flags,
        )
    with contextlib.suppress(psutil.Error):  # gone already
        note = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        write_atomic(job.process_json, json.dumps(note))
    # Takes note of the end, so that no dead process stays in the system's table; and of the exit code, for commands
    # that say nothing about themselves.
    threading.Thread(target=_await_end, args=(process, job), daemon=True, name=f"reap-{process.pid}").start()
    return job


def _await_end(process: subprocess.Popen[bytes], job: JobFolder) -> None:
    code = process.wait()
    with contextlib.suppress(OSError):  # the folder was removed meanwhile
        write_atomic(job.path / "exit.json", json.dumps({"code": code}), durable=False)


def find_job(job_id: str | None) -> JobFolder | None:
    """The job of that id, or None. An id is only compared with what is there and never leads elsewhere."""
    return next((job for job in _all_jobs() if job.path.name == job_id), None)


def list_jobs(kind: str | None = None) -> list[JobView]:
    """Newest first; only those of `kind` when it is given."""
    views = [look_at_job(job) for job in reversed(_all_jobs())]
    return [view for view in views if kind is None or view.kind == kind]


def look_at_job(job: JobFolder) -> JobView:
    """What the folder says at this moment."""
    # Read before the events: a process that ends in between has written all of them.
    is_alive = _is_alive(job)
    info = _read_json(job.job_json)
    subject = info.get("subject")
    done, total, text, error, outcome = 0.0, 0.0, "", "", None
    has_started, updated = False, 0.0
    results: list[Mapping[str, object]] = []
    warnings: list[str] = []
    for event in EventReader(job.events_jsonl).read_new():
        updated = _number(event.get("time"))
        match event["kind"]:
            case "started":
                has_started = True
            case "progress":
                done, total = _number(event.get("done")), _number(event.get("total"))
                text = str(event.get("text") or text)
            case "note":
                text = str(event.get("text") or "")
            case "result":
                facts = {
                    name: value for name, value in event.items() if name not in ("schema", "seq", "attempt", "kind")
                }
                if isinstance(facts.get("path"), str):
                    facts["path"] = str(job.path / str(facts["path"]))
                results.append(facts)
            case "warning":
                warnings.append(str(event.get("message") or ""))
            case "error":
                parts = [str(event.get(name) or "") for name in ("message", "where", "hint")]
                where = f" ({parts[1]})" if parts[1] else ""
                line = f"{parts[0].rstrip('.')}{where}. {parts[2]}".strip()
                error = f"{error}\n{line}".strip()
            case "finished":
                outcome = str(event.get("outcome"))
            case _:
                pass
    state = _state(job, outcome, has_started=has_started, is_alive=is_alive)
    if state in ("crashed", "failed") and not error:
        lines = read_job_log(job).splitlines()
        error = lines[-1] if lines else ""
    return JobView(
        job,
        kind=str(info.get("kind", "")),
        title=str(info.get("title", "")),
        subject=cast("Mapping[str, object]", subject) if isinstance(subject, dict) else {},
        created=_number(info.get("created")),
        state=state,
        done=done,
        total=total,
        text=text,
        results=tuple(results),
        warnings=tuple(warnings),
        error=error,
        updated=updated,
    )


def cancel_job(job: JobFolder) -> None:
    """Ask the job to end; it does so at its next piece of work, and what it made so far stays."""
    write_atomic(job.cancel_file, "")


def terminate_job(job: JobFolder) -> None:
    """End the job's process at once, for one that does not listen to `cancel_job`."""
    write_atomic(job.cancel_file, "")
    process = _process(job)
    if process is not None:
        with contextlib.suppress(psutil.Error):
            process.terminate()


def remove_job(job: JobFolder) -> None:
    """Remove an ended job's folder with what it made. Does nothing while it runs."""
    if not _is_alive(job):
        shutil.rmtree(job.path, ignore_errors=True)


def remove_old_jobs(kind: str) -> None:
    ended = [view for view in list_jobs(kind) if not view.is_live]
    for view in ended[KEPT_JOBS:]:
        remove_job(view.job)


def read_job_log(job: JobFolder) -> str:
    """The last lines that the process wrote."""
    try:
        with job.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - LOG_TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")).strip("\n")


def _all_jobs() -> list[JobFolder]:
    try:
        paths = sorted(jobs_dir().iterdir(), key=lambda path: path.name)
    except OSError:
        return []
    return [JobFolder(path) for path in paths if (path / "job.json").is_file()]


def _state(job: JobFolder, outcome: str | None, *, has_started: bool, is_alive: bool) -> JobState:
    if outcome in ("completed", "cancelled", "failed"):
        return cast("JobState", outcome)
    if is_alive:
        return "running" if has_started else "starting"
    code = _read_json(job.path / "exit.json").get("code")
    if job.cancel_file.exists():
        return "cancelled"
    if code is not None and not has_started:
        return "completed" if code == 0 else "failed"
    if not job.process_json.exists() and time.time() - job.path.stat().st_mtime < START_SECONDS:
        return "starting"
    return "crashed"


def _is_alive(job: JobFolder) -> bool:
    return _process(job) is not None


def _process(job: JobFolder) -> psutil.Process | None:
    """The job's process while it runs; another one that got its number later is not taken for it."""
    note = _read_json(job.process_json)
    try:
        process = psutil.Process(int(_number(note["pid"])))
        same = abs(process.create_time() - _number(note["started"])) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (KeyError, ValueError, psutil.Error):
        return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _read_json(path: Path) -> dict[str, object]:
    try:
        parsed: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}
