"""Whether somebody works in a run: its lock, which the system frees however the worker dies, and its heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from filelock import FileLock, Timeout

from trainer.schema.base import UserError
from trainer.schema.run_folder import RunFolder, write_atomic

HEARTBEAT_SECONDS: Final = 2.0

_LOCK_WAIT_SECONDS: Final = 2.0
"""A worker waits this long for its lock, as somebody may be probing it at that moment."""
_PROBE_SECONDS: Final = 0.02
"""A probe tries for this long, as a probe of another process may hold the lock for an instant."""
_PROBE_TURN: Final = threading.Lock()
"""Probes of one process take turns, or on a busy machine one could take the other for a worker."""
_PROBE_POLL_SECONDS: Final = 0.004


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
