"""Runs as the interface finds them on disk, with a real process in the folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fluxgui import run_start, runs
from fluxgui.runs import RunView, RunWatcher
from trainer.schema.base import UserError
from trainer.schema.events import EventWriter
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_queue import withdraw

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path))
    return tmp_path


def make_run(home: Path, name: str = "mycat", **info: object) -> RunFolder:
    return RunFolder.create(
        home / "runs",
        name,
        config_toml='output_name = "mycat"\n',
        dataset_toml="",
        sample_prompts="a cat\n",
        info={"name": name, **info},
    )


@pytest.fixture
def start(home: Path) -> Iterator[Callable[[RunFolder], subprocess.Popen[bytes]]]:
    """Starts the process that writes into a run folder; whatever is left is ended after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_process(run: RunFolder) -> subprocess.Popen[bytes]:
        with run.worker_log.open("ab") as log:
            command = [sys.executable, "-m", "tests.fluxgui.worker_process", str(run.path)]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()
        process.wait()


def wait_for(look: Callable[[], RunView], what: Callable[[RunView], bool]) -> RunView:
    end = time.monotonic() + 20
    view = look()
    while not what(view):
        assert time.monotonic() < end, f"waited in vain; the run is {view.status}, step {view.state.step}"
        time.sleep(0.05)
        view = look()
    return view


def test_a_run_is_watched_commanded_and_stopped(
    home: Path, start: Callable[[RunFolder], subprocess.Popen[bytes]]
) -> None:
    run, watcher = make_run(home), RunWatcher()
    process = start(run)
    view = wait_for(lambda: watcher.look(run), lambda v: v.state.step >= 3)
    assert (view.name, view.status.state, view.state.num_steps, view.is_live) == ("mycat", "running", 1000, True)
    runs.send(run, "pause")
    wait_for(lambda: watcher.look(run), lambda v: v.status.state == "paused")
    runs.send(run, "resume")
    wait_for(lambda: watcher.look(run), lambda v: v.status.state == "running")
    runs.send(run, "stop")
    process.wait(10)
    view = wait_for(lambda: watcher.look(run), lambda v: not v.is_live)
    assert view.status.state == "stopped"
    assert runs.pending_commands(run) == []


def test_a_killed_worker_is_shown_as_crashed_with_its_log(
    home: Path, start: Callable[[RunFolder], subprocess.Popen[bytes]]
) -> None:
    run, watcher = make_run(home), RunWatcher()
    process = start(run)
    wait_for(lambda: watcher.look(run), lambda v: v.state.step >= 2)
    process.kill()
    process.wait()
    view = wait_for(lambda: watcher.look(run), lambda v: not v.is_live)
    assert view.status.state == "crashed"
    assert runs.read_log_tail(run) == "the first line of the log"


def test_a_new_watcher_sees_what_the_old_one_saw(
    home: Path, start: Callable[[RunFolder], subprocess.Popen[bytes]]
) -> None:
    run, watcher = make_run(home), RunWatcher()
    process = start(run)
    wait_for(lambda: watcher.look(run), lambda v: v.state.step >= 5)
    process.kill()
    process.wait()
    assert RunWatcher().look(run).state == watcher.look(run).state


def test_runs_are_listed_newest_first(home: Path) -> None:
    names = [make_run(home, name).path.name for name in ("one", "two", "three")]
    assert [view.run_id for view in RunWatcher().look_at_all()] == sorted(names, reverse=True)


def test_a_run_nobody_started_waits_and_one_whose_process_is_gone_has_crashed(home: Path) -> None:
    run = make_run(home)
    assert RunWatcher().look(run).status.state == "queued"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.worker_log.write_text("no module named trainer\n", encoding="utf-8")
    (run.path / "process.json").write_text(f'{{"pid": {gone.pid}, "started": 1.0}}', encoding="utf-8")
    assert RunWatcher().look(run).status.state == "crashed"


def test_the_worker_is_started_in_its_own_session_with_its_output_in_the_log(home: Path) -> None:
    run = make_run(home)
    run.config_toml.write_text("no_such_option = 1\n", encoding="utf-8")
    run_start.start_worker(run)
    pid = int((run.path / "process.json").read_text().split('"pid":')[1].split(",")[0])
    if sys.platform != "win32":
        assert os.getsid(pid) == pid
    view = wait_for(lambda: RunWatcher().look(run), lambda v: not v.is_live)
    assert view.status.state in ("failed", "crashed")
    assert "no_such_option" in runs.read_log_tail(run)


def test_starting_again_makes_a_new_run_with_the_same_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(home)
    withdraw(run)
    monkeypatch.setattr(run_start, "PROGRAM_FOLDER", home)  # no trainer there: the process ends at once
    again = runs.start_again(run)
    assert again.path != run.path
    assert again.config_toml.read_text() == run.config_toml.read_text()
    assert again.read_info()["parent"] == run.path.name
    wait_for(lambda: RunWatcher().look(again), lambda v: v.status.state == "crashed")


def test_a_run_that_ended_is_starting_again_until_its_new_trainer_speaks(
    home: Path, start: Callable[[RunFolder], subprocess.Popen[bytes]]
) -> None:
    run, watcher = make_run(home), RunWatcher()
    process = start(run)
    wait_for(lambda: watcher.look(run), lambda v: v.state.step >= 1)
    with pytest.raises(UserError, match="already at work"):
        runs.resume(run)
    with pytest.raises(UserError, match="at work"):
        runs.delete_run(run)
    process.kill()
    process.wait()
    view = wait_for(lambda: watcher.look(run), lambda v: v.can_resume)
    assert view.status.state == "crashed"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for asked, state in ((time.time(), "starting"), (1.0, "crashed")):
            started = psutil.Process(sleeper.pid).create_time()
            note = {"pid": sleeper.pid, "started": started, "asked": asked}
            (run.path / "process.json").write_text(json.dumps(note), encoding="utf-8")
            assert watcher.look(run).status.state == state
    finally:
        sleeper.kill()
        sleeper.wait()
    assert watcher.look(run).status.state == "crashed"


def test_a_deleted_run_lies_whole_in_the_bin(home: Path) -> None:
    run, twin = make_run(home, "cat"), make_run(home, "dog")
    for name in ("checkpoints/x.safetensors", "samples/a.png", "samples/b.png", "state/step-000012/state.json"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(bytes(1000))
    found = runs.contents(run)
    assert (found.num_checkpoints, found.num_samples, found.has_state) == (1, 2, True)
    assert 4000 < found.num_bytes < 6000
    taken = home / "bin" / run.path.name
    taken.mkdir(parents=True)
    assert runs.delete_run(run) == taken.with_name(f"{taken.name}-2")
    assert (home / "bin" / f"{taken.name}-2" / "samples" / "b.png").stat().st_size == 1000
    assert [view.run_id for view in RunWatcher().look_at_all()] == [twin.path.name]


def test_an_id_never_leads_out_of_the_runs_folder(home: Path) -> None:
    run = make_run(home)
    assert runs.find_run(run.path.name) == run
    for name in ("..", ".", "", "../runs/" + run.path.name, str(run.path), None):
        assert runs.find_run(name) is None


def test_only_files_that_the_events_name_are_served(home: Path) -> None:
    run = make_run(home)
    events = EventWriter(run.events_jsonl, attempt=1)
    for folder in ("samples", "checkpoints"):
        (run.path / folder).mkdir(exist_ok=True)
    for name in ("samples/a.png", "samples/b.png", "checkpoints/a.safetensors", "secret.png"):
        (run.path / name).write_bytes(b"x")
    events.write("sample", step=1, epoch=1, path="samples/a.png", prompt="p", index=0, seed=1)
    events.write("checkpoint", step=1, epoch=1, path="checkpoints/a.safetensors", bytes=1, is_final=True)
    events.write("sample", step=1, epoch=1, path="../../secret.txt", prompt="p", index=1, seed=1)
    (home / "secret.txt").write_text("x")
    view = RunWatcher().look(run)
    served = {
        (kind, name): runs.served_file(view, kind, name)
        for kind, name in (
            ("samples", "a.png"),
            ("samples", "b.png"),
            ("samples", "secret.png"),
            ("samples", "secret.txt"),
            ("checkpoints", "a.safetensors"),
            ("checkpoints", "a.png"),
            ("log", "run.json"),
            ("config", "config.toml"),
        )
    }
    found = {key: path for key, path in served.items() if path is not None}
    assert found == {
        ("samples", "a.png"): run.path / "samples/a.png",
        ("checkpoints", "a.safetensors"): run.path / "checkpoints/a.safetensors",
    }


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_a_link_to_another_kind_of_file_is_not_served(home: Path) -> None:
    run = make_run(home)
    (home / "secret.txt").write_text("x")
    (run.path / "samples").mkdir(exist_ok=True)
    (run.path / "samples" / "a.png").symlink_to(home / "secret.txt")
    EventWriter(run.events_jsonl, attempt=1).write(
        "sample", step=1, epoch=1, path="samples/a.png", prompt="p", index=0, seed=1
    )
    assert runs.served_file(RunWatcher().look(run), "samples", "a.png") is None


def test_the_log_tail_joins_what_a_progress_bar_overwrote(home: Path) -> None:
    run = make_run(home)
    run.worker_log.write_bytes(b"start\r\n 10%\r 50%\r100%\ndone\n")
    assert runs.read_log_tail(run) == "start\n100%\ndone"
    run.worker_log.write_bytes(b"\n".join(b"line %d" % n for n in range(9000)))
    tail = runs.read_log_tail(run)
    assert len(tail) <= runs.LOG_TAIL_BYTES
    assert tail.startswith("line ")
    assert tail.endswith("line 8999")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_worker_outlives_the_process_that_started_it(home: Path) -> None:
    run = make_run(home)
    code = (
        "import subprocess, sys, os, signal\n"
        "subprocess.Popen([sys.executable, '-m', 'tests.fluxgui.worker_process', sys.argv[1]], start_new_session=True,"
        " stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    starter = subprocess.run([sys.executable, "-c", code, str(run.path)], cwd=ROOT)
    assert starter.returncode == -signal.SIGKILL
    watcher = RunWatcher()
    first = wait_for(lambda: watcher.look(run), lambda v: v.state.step >= 1).state.step
    assert wait_for(lambda: watcher.look(run), lambda v: v.state.step > first + 3).status.state == "running"
    runs.send(run, "stop")
    wait_for(lambda: watcher.look(run), lambda v: v.status.state == "stopped")
