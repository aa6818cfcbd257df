"""A job: background work for the page that is no training, such as test pictures, captions or a download.

A job is a process of its own with a folder. The page writes `job.json` and, to end it early, an empty file `cancel`; the
process writes `events.jsonl` (the form of a run's events), and whatever it makes into `output/`. Whoever looks reads the
folder, so that a reload of the page or a restart of the program loses nothing.

Events: `started`, `progress` (`done`, `total`, `text`), `result` (`path` and whatever else is known of it), `warning`
and `error` (as in a run), `finished` (`outcome`: completed, cancelled or failed).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from trainer.schema.base import Problem, UserError
from trainer.schema.events import EventWriter

logger = logging.getLogger("trainer")

EXIT_DONE, EXIT_BUG, EXIT_FIXABLE, EXIT_CANCELLED = 0, 1, 3, 130
PROGRESS_SECONDS: Final = 0.2
"""Progress events closer together than this are dropped; the last one of a count never is."""


class JobCancelled(Exception):
    """Raised between pieces of work once the job was cancelled."""


@dataclass(frozen=True)
class JobFolder:
    """The folder of one job; its name is the job's id."""

    path: Path

    @property
    def job_json(self) -> Path:
        return self.path / "job.json"

    @property
    def process_json(self) -> Path:
        return self.path / "process.json"

    @property
    def events_jsonl(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def cancel_file(self) -> Path:
        return self.path / "cancel"

    @property
    def log(self) -> Path:
        return self.path / "job.log"

    @property
    def output_dir(self) -> Path:
        return self.path / "output"


class JobReporter:
    """What a job tells of itself, and whether it was cancelled. Without a folder it only logs, for the command line."""

    def __init__(self, job: JobFolder | None = None) -> None:
        self._job = job
        self._events = None if job is None else EventWriter(job.events_jsonl, attempt=1)
        self._cancelled = threading.Event()
        self._last_progress = 0.0

    def progress(self, done: float, total: float, text: str = "") -> None:
        """`done` of `total` pieces, `text` says of what. Raises `JobCancelled` when that was asked for."""
        now = time.monotonic()
        if done >= total or now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            self._event("progress", done=done, total=total, text=text)
        self.check_cancelled()

    def note(self, text: str) -> None:
        """A line of the log, and what the page shows as the work under way."""
        logger.info(text)
        self._event("note", text=text)

    def result(self, path: Path | None = None, **facts: object) -> None:
        """Something is ready: a file (shown relative to the job's folder when inside it) or other facts."""
        shown = {} if path is None else {"path": self._shown(path)}
        self._event("result", **shown, **facts)

    def warning(self, text: str) -> None:
        logger.warning(text)
        self._event("warning", message=text)

    def error(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            self._event("error", message=problem.what, where=problem.where or "", hint=problem.hint or "")

    def finished(self, outcome: str) -> None:
        self._event("finished", outcome=outcome)

    def started(self) -> None:
        self._event("started", pid=os.getpid())

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set() or (self._job is not None and self._job.cancel_file.exists())

    def check_cancelled(self) -> None:
        if self.is_cancelled():
            raise JobCancelled

    @contextlib.contextmanager
    def listening_to_signals(self) -> Generator[None]:
        """Meanwhile SIGINT and SIGTERM cancel between pieces of work, and a second one exits at once."""

        def handle(signal_number: int, _frame: FrameType | None) -> None:
            if self._cancelled.is_set():
                os._exit(128 + signal_number)
            self._cancelled.set()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _event(self, kind: str, **fields: object) -> None:
        if self._events is not None:
            self._events.write(kind, **fields)

    def _shown(self, path: Path) -> str:
        if self._job is not None:
            try:
                return path.resolve().relative_to(self._job.path.resolve()).as_posix()
            except ValueError:
                pass
        return str(path.resolve())


def run_job(folder: Path | None, work: Callable[[JobReporter], None]) -> int:
    """Do `work` as the job of `folder` (None on the plain command line); says how it ended and returns the exit code.

    Without a folder a `UserError` goes through to the command line, which prints it.
    """
    reporter = JobReporter(None if folder is None else JobFolder(folder))
    reporter.started()
    outcome, code = "failed", EXIT_BUG
    try:
        with reporter.listening_to_signals():
            work(reporter)
        outcome, code = "completed", EXIT_DONE
    except JobCancelled:
        outcome, code = "cancelled", EXIT_CANCELLED
    except UserError as error:
        if folder is None:
            raise
        reporter.error(error.problems)
        logger.error("%s", error)
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 - a process's entry point: whatever it is, the page has to say so
        is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        what = "there is not enough memory" if is_memory else f"{type(error).__name__}: {error}"
        hint = (
            "Close other programs or use smaller settings." if is_memory else "This is a bug; the log has the details."
        )
        reporter.error([Problem(what, hint=hint)])
        logger.error("%s", traceback.format_exc())
        code = EXIT_FIXABLE if is_memory else EXIT_BUG
    finally:
        reporter.finished(outcome)
    return code
