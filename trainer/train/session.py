"""One worker process from start to exit code: lock, heartbeat, events, console, and what an error becomes.

This is the only place that catches every exception.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from filelock import FileLock, Timeout
from tqdm import tqdm

from trainer.schema.base import Problem, UserError
from trainer.schema.events import EventReader, EventWriter
from trainer.schema.folders import data_home
from trainer.schema.options import Options
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_liveness import Heartbeat, WorkerLock
from trainer.train.host_memory import host_memory_text, is_host_out_of_memory
from trainer.train.notify import notify_end
from trainer.train.reporting import Reporter, StopRequested

logger = logging.getLogger("trainer")

EXIT_DONE, EXIT_BUG, EXIT_OPTIONS, EXIT_FIXABLE = 0, 1, 2, 3
DEVICE_POLL_SECONDS = 0.5


if TYPE_CHECKING:
    TextHandler = logging.StreamHandler[TextIO]
else:
    # Python 3.10 has no type parameter here.
    TextHandler = logging.StreamHandler


class ConsoleHandler(TextHandler):
    """Writes lines above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def configure_console(options: Options | None) -> None:
    """Sets the log level and where lines go: stderr, or `--console_log_file` (begun anew)."""
    level = (options.console_log_level if options else None) or "INFO"
    handler: logging.Handler
    # One process begins the file anew; the others write to the console.
    if options is not None and options.console_log_file is not None and is_main_process():
        try:
            options.console_log_file.absolute().parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(options.console_log_file, mode="w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"the log file cannot be written: {error.strerror or error}",
                str(options.console_log_file),
                "Choose another --console_log_file.",
                field="console_log_file",
            ) from error
    elif options is not None and options.console_log_simple:
        handler = ConsoleHandler(sys.stdout)
    else:
        handler = ConsoleHandler(sys.stderr)
    simple = options is not None and options.console_log_simple
    handler.setFormatter(logging.Formatter("%(message)s" if simple else "%(asctime)s %(levelname)-7s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("trainer").setLevel(level)


def is_main_process() -> bool:
    """Whether this is rank 0 of a launch (or the only process)."""
    return os.environ.get("RANK", "0") == "0"


def run_guarded(work: Callable[[], None], reporter: Reporter) -> int:
    """Runs `work`, reports how it ended through `reporter`, and returns the exit code."""
    outcome, code = "failed", EXIT_BUG
    try:
        work()
        outcome, code = "completed", EXIT_DONE
    except StopRequested:
        outcome, code = "stopped", EXIT_DONE
    except UserError as error:
        reporter.error(error.problems)
        logger.error("%s", error)
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 - the entry point: whatever it is, the page and the log must say so
        if is_host_out_of_memory(error):
            code = EXIT_FIXABLE
            _report(reporter, *host_memory_text())
        elif type(error).__name__ == "OutOfMemoryError":
            code = EXIT_FIXABLE
            _report(
                reporter,
                f"the GPU ran out of memory: {str(error).strip().splitlines()[0].rstrip('.')}",
                "Close other programs on it, raise blocks_to_swap, turn on gradient_checkpointing and both caches, or lower "
                "the resolution.",
            )
        else:
            _report(reporter, f"{type(error).__name__}: {error}", "This is a bug; the log has the details.")
        logger.error("%s", traceback.format_exc())
    finally:
        reporter.finished(outcome, steps=reporter.num_steps_done)
        reporter.close()
    return code


def _report(reporter: Reporter, what: str, hint: str) -> None:
    reporter.error([Problem(what, hint=hint)])
    logger.error("%s. %s", what, hint)


def run_in_folder(path: Path, work: Callable[[RunFolder, Reporter], None]) -> int:
    """A worker for a run folder: lock, attempt number, heartbeat, events; then `work`."""
    configure_console(None)
    if not path.is_dir():
        logger.error("%s is not a run folder", path)
        return EXIT_OPTIONS
    run = RunFolder(path)
    try:
        lock = WorkerLock(run)
        lock.acquire()
    except (Timeout, UserError):
        logger.error("another worker already trains in %s", path)
        return EXIT_FIXABLE
    try:
        attempt = 1 + max(
            (int(str(event.get("attempt", 0))) for event in EventReader(run.events_jsonl).read_new()), default=0
        )
        events = EventWriter(run.events_jsonl, attempt)
        with Heartbeat(run) as heartbeat:
            reporter = Reporter(run, events=events, heartbeat=heartbeat)
            reporter.install_signal_handlers()
            reporter.event("run_started", pid=os.getpid(), device="", version=1, python=platform.python_version())
            code = run_guarded(lambda: work(run, reporter), reporter)
    finally:
        lock.release()
    # The run has ended by now, whatever becomes of the message.
    notify_end(run)
    return code


class DeviceLock:
    """One run at a time on a device, among runs started from the interface; others wait in turn."""

    def __init__(self, device: str, reporter: Reporter) -> None:
        folder = data_home() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(folder / f"device-{device.replace(':', '-')}.lock"))
        self._reporter = reporter

    def __enter__(self) -> DeviceLock:
        waiting = False
        while True:
            try:
                self._lock.acquire(timeout=0)
                return self
            except Timeout:
                if not waiting:
                    waiting = True
                    self._reporter.phase("waiting")
                    self._reporter.note("waiting: another run uses this device")
                time.sleep(DEVICE_POLL_SECONDS)
                self._reporter.check_stop()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
