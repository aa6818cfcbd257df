"""The queue: which runs wait, in which order, and when the next one starts. With real processes in the folders."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxgui import run_start, runs
from fluxgui.run_start import QueueKeeper, start_due, waiting_runs
from fluxgui.runs import RunWatcher
from tests.fluxgui.test_runs import home, make_run, start, wait_for
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_queue import ask_for_start, move, withdraw

__all__ = ["home", "start"]  # fixtures

Start = Callable[[RunFolder], "subprocess.Popen[bytes]"]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, start: Start) -> list[str]:
    """Names of the runs that the queue started, each with a process that lives until it is told to stop."""
    started: list[str] = []

    def start_it(run: RunFolder) -> None:
        process = start(run)
        note = f'{{"pid": {process.pid}, "asked": {time.time()}, "started": {run_start.psutil.Process(process.pid).create_time()}}}'
        (run.path / "process.json").write_text(note, encoding="utf-8")
        started.append(run.path.name)

    monkeypatch.setattr(run_start, "start_worker", start_it)
    return started


def names(found: list[RunFolder]) -> list[str]:
    return [run.path.name.rpartition("-")[2] for run in found]


def state(run: RunFolder) -> str:
    return RunWatcher().look(run).status.state


def test_one_run_trains_on_a_device_and_the_next_starts_when_it_ends(home: Path, workers: list[str]) -> None:
    one, two = make_run(home, "one"), make_run(home, "two")
    assert names(start_due()) == ["one"]
    assert state(two) == "queued"
    assert start_due() == []
    watcher = RunWatcher()
    wait_for(lambda: watcher.look(one), lambda view: view.state.step > 1)
    assert start_due() == []
    keeper = QueueKeeper()
    keeper.start()
    runs.send(one, "stop")
    wait_for(lambda: watcher.look(two), lambda view: view.state.step > 1)
    keeper.stop()
    assert [name.rpartition("-")[2] for name in workers] == ["one", "two"]
    assert (state(one), state(two)) == ("stopped", "running")


def test_runs_of_different_devices_do_not_wait_for_each_other(home: Path, workers: list[str]) -> None:
    one, two = make_run(home, "one"), make_run(home, "two")
    one.config_toml.write_text('device = "cpu"\n', encoding="utf-8")
    two.config_toml.write_text('[memory]\ndevice = "cuda"\n', encoding="utf-8")
    assert names(start_due()) == ["one", "two"]


def test_runs_wait_in_the_order_that_they_were_given_and_can_be_taken_out(home: Path) -> None:
    made = {name: make_run(home, name) for name in ("one", "two", "three")}
    assert names(waiting_runs()) == ["one", "two", "three"]
    move(waiting_runs(), made["three"], -1)
    assert names(waiting_runs()) == ["one", "three", "two"]
    move(waiting_runs(), made["one"], 1)
    assert names(waiting_runs()) == ["three", "one", "two"]
    move(waiting_runs(), made["three"], -1)  # there is nothing before it
    assert names(waiting_runs()) == ["three", "one", "two"]
    withdraw(made["one"])
    assert names(waiting_runs()) == ["three", "two"]
    assert RunWatcher().look(made["one"]).status.detail == "It was taken out of the queue."
    assert RunWatcher().look(made["one"]).can_resume


def test_to_stop_a_run_that_waits_is_to_take_it_out(home: Path) -> None:
    run = make_run(home)
    runs.send(run, "stop")
    assert (state(run), runs.pending_commands(run)) == ("stopped", [])


def test_a_run_asked_for_again_waits_behind_the_others(home: Path, workers: list[str]) -> None:
    one, two, three = (make_run(home, name) for name in ("one", "two", "three"))
    start_due()
    watcher = RunWatcher()
    wait_for(lambda: watcher.look(one), lambda view: view.state.step > 0)
    withdraw(two)
    runs.resume(two)
    assert names(waiting_runs()) == ["three", "two"]
    assert state(three) == "queued"


def test_a_run_whose_process_ended_without_a_word_is_not_started_over_and_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(home)
    monkeypatch.setattr(run_start, "PROGRAM_FOLDER", home)  # no trainer there: the process ends at once
    assert names(start_due()) == ["mycat"]
    wait_for(lambda: RunWatcher().look(run), lambda view: view.status.state == "crashed")
    assert start_due() == []
    runs.resume(run)
    assert run.worker_log.read_text(encoding="utf-8").count("No module named trainer") >= 1
    wait_for(lambda: RunWatcher().look(run), lambda view: view.status.state == "crashed")
    assert run.worker_log.read_text(encoding="utf-8").count("No module named trainer") == 2


def test_a_clock_that_was_set_back_does_not_lose_a_wish(home: Path) -> None:
    run = make_run(home)
    (run.path / "process.json").write_text(
        f'{{"pid": 0, "asked": {time.time() + 3600}, "started": 1.0}}', encoding="utf-8"
    )
    assert waiting_runs() == []
    ask_for_start(run)
    assert waiting_runs() == [run]


def test_the_queue_of_a_program_that_is_not_there_waits(home: Path) -> None:
    run = make_run(home)
    code = "from fluxgui.run_start import waiting_runs; print(*[run.path.name for run in waiting_runs()])"
    for _ in range(2):  # each a program of its own that finds the same queue
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout.split() == [run.path.name]
