"""A run on disk: creation, commands, lock, heartbeat, and every row of the table of states."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from trainer.schema.base import UserError
from trainer.schema.events import EventWriter
from trainer.schema.run_folder import Command, RunFolder, list_runs, write_atomic
from trainer.schema.run_liveness import Heartbeat, WorkerLock, is_locked
from trainer.schema.run_probe import RunStatus, probe

NEW_YEAR = time.mktime((2026, 1, 14, 20, 31, 12, 0, 0, -1))


def make_run(folder: Path, name: str = "My cat", **info: object) -> RunFolder:
    return RunFolder.create(
        folder,
        name,
        config_toml="a = 1\n",
        dataset_toml="[general]\n",
        sample_prompts="a cat\n",
        info=info,
        clock=lambda: NEW_YEAR,
    )


@dataclass(frozen=True)
class Facts:
    num_seen: int = 5
    phase: str = "training"
    is_paused: bool = False
    step_seconds: float | None = 1.0
    outcome: Literal["completed", "stopped", "failed"] | None = None


@contextmanager
def worker_process(run: RunFolder) -> Generator[subprocess.Popen[str], None, None]:
    """Another process that holds the run's lock."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom trainer.schema.run_folder import RunFolder\nfrom trainer.schema.run_liveness import WorkerLock\n"
        "with WorkerLock(RunFolder(Path(sys.argv[1]))):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def write_heartbeat(run: RunFolder, *, written: float, progressed: float, phase: str = "training") -> None:
    beat = {"pid": 1, "time": written, "phase": phase, "progress": "", "progress_time": progressed}
    run.heartbeat_json.write_text(json.dumps(beat), encoding="utf-8")


# ---- folder ----


def test_a_new_run_has_its_files_under_an_id_of_time_and_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "My Cat é!", parent="other")
    assert run.path.name == "20260114-203112-my-cat-e"
    assert run.config_toml.read_bytes() == b"a = 1\n"
    assert run.dataset_toml.read_bytes() == b"[general]\n"
    assert run.sample_prompts_txt.read_bytes() == b"a cat\n"
    assert run.read_info() == {
        "schema": 1,
        "name": "My Cat é!",
        "created": NEW_YEAR,
        "request": "start",
        "parent": "other",
    }
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.toml",
        "control",
        "dataset.toml",
        "run.json",
        "sample_prompts.txt",
        "samples",
    ]
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name], "nothing temporary stays"


@pytest.mark.parametrize(
    ("name", "slug"),
    [("猫", "run"), ("", "run"), ("../../etc", "etc"), ("con", "con"), ("x" * 200, "x" * 40), ("a/b\\c:d", "a-b-c-d")],
)
def test_any_name_gives_a_harmless_folder_inside_the_runs_folder(tmp_path: Path, name: str, slug: str) -> None:
    run = make_run(tmp_path, name)
    assert run.path == tmp_path / f"20260114-203112-{slug}"
    assert run.read_info()["name"] == name


def test_runs_of_one_name_and_second_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: make_run(tmp_path, "cat"), range(16)))
    names = {run.path.name for run in runs}
    assert names == {"20260114-203112-cat", *(f"20260114-203112-cat-{n}" for n in range(2, 17))}
    assert all(run.read_info()["name"] == "cat" for run in runs)


def test_a_run_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        make_run(tmp_path, "cat", unwritable=object())
    assert list(tmp_path.iterdir()) == []


def test_only_whole_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    second, first = make_run(tmp_path, "b"), make_run(tmp_path, "a")
    (tmp_path / ".new-0").mkdir()
    (tmp_path / ".new-0" / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "something").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert list_runs(tmp_path) == [first, second]


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_damaged_run_json_reads_as_empty(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path)
    run.run_json.write_text(content, encoding="utf-8")
    assert run.read_info() == {}
    assert RunFolder(tmp_path / "gone").read_info() == {}


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_bytes() == b"old\n"
    write_atomic(path, b"new\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


# ---- commands ----


def test_commands_are_taken_in_the_order_in_which_they_were_sent(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    ids = [run.send_command(name) for name in ("save", "pause", "stop")]
    assert ids == ["0001-save", "0002-pause", "0003-stop"]
    commands = run.take_commands()
    assert commands == [Command("0001-save", "save"), Command("0002-pause", "pause"), Command("0003-stop", "stop")]
    assert json.loads((run.control_dir / "0001-save.json").read_bytes())["name"] == "save"
    run.finish_command(commands[0])
    assert run.take_commands() == commands[1:]
    assert [path.name for path in run.done_dir.iterdir()] == ["0001-save.json"]


def test_ids_go_on_after_the_commands_that_are_done(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for number in range(1, 13):
        run.send_command("save")
        (command,) = run.take_commands()
        assert command.id == f"{number:04d}-save"
        run.finish_command(command)
    run.finish_command(Command("0001-save", "save"))  # finishing twice does no harm
    assert len(list(run.done_dir.iterdir())) == 12


def test_a_number_beyond_four_digits_still_comes_last(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("9999-save", "10000-stop"):
        (run.control_dir / f"{name}.json").write_text("{}", encoding="utf-8")
    assert [command.name for command in run.take_commands()] == ["save", "stop"]


def test_files_that_are_no_commands_are_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("notes.txt", ".0001-save.json.ab12cd34.tmp", "x-save.json", "0001-.json"):
        (run.control_dir / name).write_text("{}", encoding="utf-8")
    assert run.take_commands() == []
    with pytest.raises(ValueError, match="cannot be a command"):
        run.send_command("../stop")
    assert RunFolder(tmp_path / "gone").take_commands() == []


# ---- lock ----


def test_the_lock_is_seen_from_outside_and_freed_however_the_worker_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert not is_locked(run)
    with worker_process(run) as process:
        for _ in range(20):
            assert is_locked(run)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
        assert not is_locked(run)


def test_a_run_has_one_worker_at_a_time(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with worker_process(run), pytest.raises(UserError, match="another worker"):
        WorkerLock(run).acquire()
    with WorkerLock(run):
        assert is_locked(run)
    assert not is_locked(run)


def test_probing_neither_keeps_a_worker_from_starting_nor_sees_other_probes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with WorkerLock(run):
        pass  # makes the file
    done = threading.Event()

    def look() -> list[bool]:
        seen: list[bool] = []
        while not done.wait(0.002):
            seen.append(is_locked(run))
        return seen

    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(look) for _ in range(4)]
        done.wait(0.3)
        done.set()
        assert not any(any(future.result()) for future in looking), "a probe took another probe for a worker"
        done.clear()
        looking = [pool.submit(look) for _ in range(4)]
        try:
            for _ in range(5):
                with WorkerLock(run):
                    assert is_locked(run)
        finally:
            done.set()
        assert any(future.result() for future in looking)


def test_probing_a_folder_that_vanished_does_not_bring_it_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "gone")
    assert not is_locked(run)
    assert not run.path.exists()
    there = make_run(tmp_path)
    assert not is_locked(there)
    assert not there.worker_lock.exists()


# ---- heartbeat ----


def test_the_heartbeat_tells_process_phase_and_when_work_last_went_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    now = [100.0]
    with Heartbeat(run, clock=lambda: now[0]) as heartbeat:
        first = json.loads(run.heartbeat_json.read_bytes())
        assert first == {"pid": os.getpid(), "time": 100.0, "phase": "", "progress": "", "progress_time": 100.0}
        now[0] = 105.0
        heartbeat.update(phase="text")
        heartbeat.update(progress="text 1/2")
        now[0] = 107.0
    last = json.loads(run.heartbeat_json.read_bytes())
    assert (last["phase"], last["progress"], last["progress_time"], last["time"]) == ("text", "text 1/2", 105.0, 107.0)


def test_the_heart_beats_by_itself_and_survives_a_folder_that_vanished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.schema.run_liveness.HEARTBEAT_SECONDS", 0.01)
    run = make_run(tmp_path)
    beats = iter(range(10**6))
    with Heartbeat(run, clock=lambda: float(next(beats))):
        deadline = time.monotonic() + 10
        while json.loads(run.heartbeat_json.read_bytes())["time"] < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(run.heartbeat_json.read_bytes())["time"] >= 20
        run.path.rename(tmp_path / "moved")
    assert not run.path.exists()


# ---- states ----


def test_a_run_that_was_asked_to_start_and_has_no_worker_is_queued(tmp_path: Path) -> None:
    assert probe(make_run(tmp_path), Facts(num_seen=0)).state == "queued"


def test_a_run_that_was_not_asked_to_start_is_not_queued(tmp_path: Path) -> None:
    assert probe(make_run(tmp_path, request=None), Facts(num_seen=0)).state == "stopped"


def test_a_worker_that_died_before_its_first_event_has_crashed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_heartbeat(run, written=0, progressed=0, phase="")
    status = probe(run, Facts(num_seen=0, phase=""))
    assert status == RunStatus("crashed", "The trainer ended without a word while starting.")


@pytest.mark.parametrize("outcome", ["completed", "stopped", "failed"])
def test_a_finished_run_is_what_its_last_event_says(
    tmp_path: Path, outcome: Literal["completed", "stopped", "failed"]
) -> None:
    run = make_run(tmp_path)
    run.events_jsonl.touch()
    assert probe(run, Facts(outcome=outcome)) == RunStatus(outcome)


def test_a_run_without_worker_and_without_an_end_has_crashed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.events_jsonl.touch()
    status = probe(run, Facts(phase="latents"))
    assert status == RunStatus("crashed", "The trainer ended without a word while caching pictures.")


def test_a_run_that_ends_between_the_two_looks_has_not_crashed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    EventWriter(run.events_jsonl, 1).write("run_finished", outcome="completed", steps=3)
    assert probe(run, Facts(outcome=None)) == RunStatus("completed")


def test_a_run_with_a_worker_and_a_fresh_heartbeat_runs_or_is_paused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_heartbeat(run, written=1000, progressed=900)
    with worker_process(run):
        assert probe(run, Facts(), clock=lambda: 1001.0) == RunStatus("running")
        assert probe(run, Facts(outcome="stopped"), clock=lambda: 1001.0) == RunStatus("running")
        write_heartbeat(run, written=9000, progressed=400)
        assert probe(run, Facts(is_paused=True), clock=lambda: 9001.0) == RunStatus("paused")
        run.heartbeat_json.unlink()
        assert probe(run, Facts(), clock=lambda: 1001.0) == RunStatus("running")


@pytest.mark.parametrize(
    ("phase", "seconds", "step_seconds", "detail"),
    [
        ("text", 241, None, "No progress for 4 min while caching captions."),
        ("text", 239, None, None),
        ("latents", 250, None, "No progress for 4 min while caching pictures."),
        ("check", 121, None, "No progress for 2 min while checking files and pictures."),
        ("model", 899, None, None),
        ("model", 901, None, "No progress for 15 min while loading the model."),
        ("training", 599, 1.0, None),
        ("training", 601, 1.0, "No progress for 10 min while training."),
        ("training", 601, 90.0, None),
        ("training", 7300, 90.0, "No progress for 2 h while training."),
        ("sampling", 601, 900.0, "No progress for 10 min while making samples."),
        ("saving", 301, None, "No progress for 5 min while saving."),
        ("waiting", 90_000, None, None),
    ],
)
def test_each_phase_has_its_own_patience(
    tmp_path: Path, phase: str, seconds: float, step_seconds: float | None, detail: str | None
) -> None:
    run = make_run(tmp_path)
    write_heartbeat(run, written=100_000, progressed=100_000 - seconds, phase=phase)
    facts = Facts(phase=phase, step_seconds=step_seconds)
    with WorkerLock(run):
        status = probe(run, facts, clock=lambda: 100_000.0)
    assert status == (RunStatus("running") if detail is None else RunStatus("stuck", detail))


def test_a_process_that_does_not_get_to_run_is_stuck_even_when_paused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_heartbeat(run, written=1000, progressed=1000)
    with WorkerLock(run):
        status = probe(run, Facts(is_paused=True), clock=lambda: 1090.0)
        assert status == RunStatus("stuck", "The trainer has not moved for 90 s while training.")
        assert probe(run, Facts(), clock=lambda: 1059.0) == RunStatus("running")
        assert probe(run, Facts(), clock=lambda: 10.0) == RunStatus("running"), "clocks that differ do no harm"
