"""The events file: whole lines, numbered over all attempts, readable while it is written."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path

import pytest

from trainer.schema.events import EventReader, EventWriter, read_last_event


def test_every_event_carries_schema_number_attempt_time_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    times = count(100.5)
    writer = EventWriter(path, 1, clock=lambda: next(times))
    writer.write("phase", name="text")
    writer.write("sample", path="samples/a.png", prompt="ein Kätzchen\u2028\n", index=0)
    assert EventReader(path).read_new() == [
        {"schema": 1, "seq": 1, "attempt": 1, "time": 100.5, "kind": "phase", "name": "text"},
        {
            "schema": 1,
            "seq": 2,
            "attempt": 1,
            "time": 101.5,
            "kind": "sample",
            "path": "samples/a.png",
            "prompt": "ein Kätzchen\u2028\n",
            "index": 0,
        },
    ]


def test_a_second_attempt_goes_on_with_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventWriter(path, 1).write("run_started", pid=1)
    second = EventWriter(path, 2)
    second.write("run_started", pid=2)
    second.write("run_finished", outcome="completed", steps=0)
    events = EventReader(path).read_new()
    assert [(event["seq"], event["attempt"]) for event in events] == [(1, 1), (2, 2), (3, 2)]


def test_a_half_written_line_is_left_for_later_and_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventWriter(path, 1).write("phase", name="text")
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"kind": "phase", "na')
    reader = EventReader(path)
    assert [event["kind"] for event in reader.read_new()] == ["phase"]
    assert reader.offset == whole
    assert reader.read_new() == []
    with path.open("ab") as file:
        file.write(b'me": "model"}\n')
    assert reader.read_new() == [{"kind": "phase", "name": "model"}]
    assert reader.bad_lines == 0


def test_a_line_that_a_killed_writer_left_open_costs_one_event_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventWriter(path, 1).write("step", step=1)
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "st')
    EventWriter(path, 2).write("run_started", pid=2)
    reader = EventReader(path)
    assert [(event["kind"], event["seq"]) for event in reader.read_new()] == [("step", 1), ("run_started", 2)]
    assert reader.bad_lines == 1


def test_lines_that_are_no_events_are_counted_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'nonsense\n[1, 2]\n{"no": "kind"}\n{"kind": 3}\n\xff\xfe\n\n{"kind": "unheard_of", "x": 1}\n')
    reader = EventReader(path)
    assert reader.read_new() == [{"kind": "unheard_of", "x": 1}]
    assert reader.bad_lines == 5


def test_a_reader_goes_on_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path, 1)
    writer.write("phase", name="text")
    first = EventReader(path)
    first.read_new()
    writer.write("phase", name="model")
    assert [event["name"] for event in EventReader(path, first.offset).read_new()] == ["model"]


def test_a_missing_file_holds_no_events(tmp_path: Path) -> None:
    assert EventReader(tmp_path / "events.jsonl").read_new() == []
    assert read_last_event(tmp_path / "events.jsonl") is None


def test_numbers_without_a_json_form_become_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventWriter(path, 1).write(
        "step", loss=math.nan, grad_norm=math.inf, buckets=[(1.5, -math.inf)], rates={"a": math.nan}
    )
    (event,) = EventReader(path).read_new()
    assert (event["loss"], event["grad_norm"], event["buckets"], event["rates"]) == (
        None,
        None,
        [[1.5, None]],
        {"a": None},
    )


def test_a_value_that_is_no_json_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path, 1)
    with pytest.raises(TypeError):
        writer.write("sample", path=tmp_path)
    writer.write("phase", name="text")
    assert [event["seq"] for event in EventReader(path).read_new()] == [1]


def test_the_last_event_is_found_in_a_long_file_and_behind_an_open_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [json.dumps({"kind": "step", "seq": seq, "text": "x" * 90}) for seq in range(1, 2001)]
    path.write_text("\n".join(lines) + '\n{"kind": "st', encoding="utf-8")
    last = read_last_event(path)
    assert last is not None
    assert last["seq"] == 2000
    path.write_text(json.dumps({"kind": "error", "seq": 7, "message": "x" * 100_000}) + "\n", encoding="utf-8")
    last = read_last_event(path)
    assert last is not None
    assert last["seq"] == 7
