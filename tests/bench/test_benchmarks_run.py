"""Each benchmark runs once at its smallest size, so that none can rot. Times are not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import bench_levers, bench_step, gpu


def test_the_step_benchmark_times_both_sides_in_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "times.json"
    assert bench_step.main(["--size=tiny", "--rounds=2", "--steps=1", f"--json={record}"]) == 0
    cells = json.loads(record.read_text(encoding="utf-8"))
    assert list(cells) == ["fp32.plain", "fp32.ckpt", "bf16.plain", "bf16.ckpt"]
    for times in cells.values():
        assert {side: len(seconds) for side, seconds in times.items()} == {"ours": 2, "diffusers+peft": 2}
    assert capsys.readouterr().out.count("ratio of medians") == 4


def test_the_gpu_benchmark_makes_its_whole_table_at_the_smallest_size(tmp_path: Path) -> None:
    table, record = tmp_path / "table.md", tmp_path / "cells.json"
    assert gpu.main(["--tiny", f"--output={table}", f"--json={record}", f"--folder={tmp_path}"]) == 0
    cells = json.loads(record.read_text(encoding="utf-8"))
    assert [(cell["storage"], cell["swap"]) for cell in cells] == [
        *(("fp32", swap) for swap in (0, 1, 2)),
        ("fp32, diffusers + peft", 0),
        *(("fp8", swap) for swap in (0, 1, 2)),
    ]
    assert all(len(cell["seconds"]) == gpu.TIMED_STEPS and not cell["left_out"] for cell in cells)
    # Of four single blocks that are swapped, two lie there at each turn: the rest come once a pass.
    copied = [cell["transfer_bytes"] > 0 for cell in cells]
    assert copied == [False, False, True, False, False, False, True]
    text = table.read_text(encoding="utf-8")
    assert "end of the first step" in text
    assert "failed" not in text


def test_the_levers_are_timed_against_the_same_step_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    quick = [lever for lever in bench_levers.LEVERS if lever != "torch_compile"]
    assert bench_levers.main(["--size=tiny", "--steps=1", "--levers", *quick]) == 0
    assert capsys.readouterr().out.count("ratio") == len(quick)
