"""The events file of a run: append-only, one JSON object a line, written by the worker and read by whoever looks.

Every event has `schema`, `seq` (1, 2, 3, ... over all attempts), `attempt`, `time` (seconds since 1970) and `kind`; the
other fields belong to the kind. Paths in events are relative to the run folder when they lie inside it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, cast

SCHEMA_VERSION: Final = 1

DURABLE_KINDS: Final = frozenset({"checkpoint", "error", "run_finished"})
"""Events that must survive a power cut; the others are only flushed."""

_TAIL_BYTES: Final = 65_536


class EventWriter:
    """Appends events; one writer at a time, the holder of the run's lock.

    Numbers go on from what the file holds. A line that a killed writer left unfinished is ended first, so that it costs
    one event and not two. The file is opened for each event and is never left open.
    """

    def __init__(self, path: Path, attempt: int, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._attempt = attempt
        self._clock = clock
        self._seq, ends_open = _last_seq(path)
        self._prefix = b"\n" if ends_open else b""

    def write(self, kind: str, **fields: object) -> None:
        """Append one event. Numbers that JSON has no form for (NaN, infinity) become null."""
        event: dict[str, object] = {
            **{name: _json_value(value) for name, value in fields.items()},
            "schema": SCHEMA_VERSION,
            "seq": self._seq + 1,
            "attempt": self._attempt,
            "time": self._clock(),
            "kind": kind,
        }
        line = self._prefix + json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            if kind in DURABLE_KINDS:
                os.fsync(file.fileno())
        self._seq += 1
        self._prefix = b""


class EventReader:
    """Reads on from where it was: `offset` is the byte after the last whole line that was read.

    `bad_lines` counts lines that are no events; they are skipped.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset
        self.bad_lines = 0

    def read_new(self) -> list[dict[str, object]]:
        """The events added since the last call; none when there is no file. A line still being written is left for later."""
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        events: list[dict[str, object]] = []
        for line in whole.splitlines():
            event = _parse_event(line)
            if event is not None:
                events.append(event)
            elif line.strip():
                self.bad_lines += 1
        return events


def read_last_event(path: Path) -> dict[str, object] | None:
    """The last whole event of the file, found from its end; None when there is none."""
    return _last_event(_read_tail(path, _TAIL_BYTES)) or _last_event(_read_tail(path, None))


def _last_event(data: bytes) -> dict[str, object] | None:
    for line in reversed(data[: data.rfind(b"\n") + 1].splitlines()):
        event = _parse_event(line)
        if event is not None:
            return event
    return None


def _last_seq(path: Path) -> tuple[int, bool]:
    """The number of the last event, 0 for none, and whether the file ends inside a line."""
    tail = _read_tail(path, 1)
    seq = (read_last_event(path) or {}).get("seq")
    return (seq if isinstance(seq, int) else 0), tail not in (b"", b"\n")


def _read_tail(path: Path, num_bytes: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0 if num_bytes is None else max(0, size - num_bytes))
            return file.read()
    except OSError:
        return b""


def _parse_event(line: bytes) -> dict[str, object] | None:
    try:
        parsed: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict):
        return None
    event = cast("dict[str, object]", parsed)
    return event if isinstance(event.get("kind"), str) else None


def _json_value(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in cast("list[object]", value)]
    return value
