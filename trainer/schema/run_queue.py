"""Which runs wait for a worker, and in which order. It stands in the run folders, so it survives every restart.

A run waits from when it is asked to start until a process was started for it. Whoever made the folder asks once, in
run.json; who asks again, or moves or withdraws the wish, writes `queue.json`; `process.json` says what was started when.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Final

from trainer.schema.run_folder import START_REQUEST, RunFolder, read_json, write_atomic

QUEUE_FILE: Final = "queue.json"
PROCESS_FILE: Final = "process.json"


def is_wanted(run: RunFolder) -> bool:
    """Whether the run waits for a process to be started in it. Says nothing about one that is at work already."""
    started = _number(read_json(run.path / PROCESS_FILE).get("asked"))
    wish = read_json(run.path / QUEUE_FILE)
    if wish:
        asked = _number(wish.get("asked"))
        return wish.get("wanted") is True and (started is None or (asked is not None and asked > started))
    traces = (run.worker_log, run.events_jsonl, run.heartbeat_json)
    is_new = started is None and not any(trace.exists() for trace in traces)
    return is_new and read_json(run.run_json).get("request") == START_REQUEST


def is_withdrawn(run: RunFolder) -> bool:
    """Whether the run was taken out of the queue and not asked for since."""
    return read_json(run.path / QUEUE_FILE).get("wanted") is False


def ask_for_start(run: RunFolder, clock: Callable[[], float] = time.time) -> None:
    """Put the run at the end of the queue."""
    now = clock()
    # A clock that was set back must not make this wish older than the process that came before it.
    started = _number(read_json(run.path / PROCESS_FILE).get("asked")) or 0.0
    _write(run, wanted=True, asked=max(now, started + 1e-3), place=now)


def withdraw(run: RunFolder) -> None:
    """Take the run out of the queue. It stays as it is and can be asked for again."""
    _write(run, wanted=False, asked=time.time(), place=place_of(run))


def place_of(run: RunFolder) -> float:
    """Runs wait in the order of this number: when each was asked for, unless it was moved since."""
    place = _number(read_json(run.path / QUEUE_FILE).get("place"))
    created = _number(read_json(run.run_json).get("created"))
    return place if place is not None else created or 0.0


def in_order(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Runs that wait, the one whose turn is next first."""
    return sorted(runs, key=lambda run: (place_of(run), run.path.name))


def move(waiting: Sequence[RunFolder], run: RunFolder, by: int) -> None:
    """Let `run` change places with its neighbour in `waiting`, which is in order: `by` -1 is earlier, 1 later."""
    position = next((i for i, other in enumerate(waiting) if other.path == run.path), None)
    if position is None or not 0 <= position + by < len(waiting):
        return
    other = waiting[position + by]
    own, others = place_of(run), place_of(other)
    if own == others:  # made in the same moment; the names decide until one is moved
        others += by * 1e-3
    _write(run, wanted=True, asked=_asked(run), place=others)
    _write(other, wanted=True, asked=_asked(other), place=own)


def _asked(run: RunFolder) -> float:
    asked = _number(read_json(run.path / QUEUE_FILE).get("asked"))
    return asked if asked is not None else time.time()


def _write(run: RunFolder, *, wanted: bool, asked: float, place: float) -> None:
    write_atomic(run.path / QUEUE_FILE, json.dumps({"wanted": wanted, "asked": asked, "place": place}) + "\n")


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
