"""Each benchmark runs once at its smallest size, so that none can rot. Times are not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import bench_levers, bench_step


def test_the_step_benchmark_times_both_sides_in_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "times.json"
    assert bench_step.main(["--size=tiny", "--rounds=2", "--steps=1", f"--json={record}"]) == 0
    cells = json.loads(record.read_text(encoding="utf-8"))
    assert list(cells) == ["fp32.plain", "fp32.ckpt", "bf16.plain", "bf16.ckpt"]
    for times in cells.values():
        assert {side: len(seconds) for side, seconds in times.items()} == {"ours": 2, "diffusers+peft": 2}
    assert capsys.readouterr().out.count("ratio of medians") == 4


def test_the_levers_are_timed_against_the_same_step_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    quick = [lever for lever in bench_levers.LEVERS if lever != "torch_compile"]
    assert bench_levers.main(["--size=tiny", "--steps=1", "--levers", *quick]) == 0
    assert capsys.readouterr().out.count("ratio") == len(quick)
