"""Background jobs: real processes of the trainer's command, seen only through their folders."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxgui.jobs import JobView, cancel_job, find_job, list_jobs, look_at_job, remove_job, start_job
from trainer.schema.base import UserError
from trainer.schema.job_folder import JobCancelled, JobFolder, JobReporter, run_job

PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path))


def wait_for(job: JobFolder, is_there: Callable[[JobView], bool]) -> JobView:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_there(view := look_at_job(job)):
        assert time.monotonic() < deadline, view
        time.sleep(0.05)
    return view


def a_job(tmp_path: Path, *, alive: bool = False) -> JobFolder:
    job = JobFolder(tmp_path / "jobs" / "20260101-000000-try-abcdef")
    job.output_dir.mkdir(parents=True)
    job.job_json.write_text('{"kind": "try", "title": "Trying", "created": 5, "subject": {"lora": "x"}}')
    if alive:
        import psutil  # noqa: PLC0415

        started = psutil.Process().create_time()
        job.process_json.write_text(f'{{"pid": {os.getpid()}, "started": {started}}}')
    else:
        job.process_json.write_text('{"pid": 999999999, "started": 1}')
    return job


def test_a_command_that_says_nothing_still_ends_as_completed_or_failed() -> None:
    good = start_job("list", "Options", ["options", "--json"])
    bad = start_job("list", "Nothing", ["options", "--no-such-flag"])
    assert wait_for(good, lambda view: not view.is_live).state == "completed"
    failed = wait_for(bad, lambda view: not view.is_live)
    assert failed.state == "failed"
    assert "--no-such-flag" in failed.error
    assert {view.job_id for view in list_jobs("list")} == {good.path.name, bad.path.name}
    assert find_job("../" + good.path.name) is None


def test_progress_results_and_the_end_are_read_from_the_folder(tmp_path: Path) -> None:
    job = a_job(tmp_path, alive=True)
    assert look_at_job(job).state == "starting"

    def work(reporter: JobReporter) -> None:
        reporter.progress(1, 2, "pictures")
        view = look_at_job(job)
        assert (view.state, view.done, view.total, view.text) == ("running", 1, 2, "pictures")
        picture = job.output_dir / "a.png"
        picture.write_bytes(b"x")
        reporter.result(picture, seed=7)
        reporter.warning("careful")
        reporter.progress(2, 2)

    assert run_job(job.path, work) == 0
    view = look_at_job(job)
    assert view.state == "completed"
    assert view.subject == {"lora": "x"}
    assert view.warnings == ("careful",)
    assert view.results[0]["path"] == str(job.output_dir / "a.png")
    assert view.results[0]["seed"] == 7


def test_a_cancelled_job_stops_at_its_next_piece(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    reached: list[int] = []

    def work(reporter: JobReporter) -> None:
        for number in range(5):
            reporter.progress(number, 5)
            reached.append(number)
            if number == 1:
                cancel_job(job)

    assert run_job(job.path, work) == 130
    assert reached == [0, 1]
    assert look_at_job(job).state == "cancelled"


def test_what_the_user_can_fix_is_shown_and_a_dead_process_counts_as_crashed(tmp_path: Path) -> None:
    job = a_job(tmp_path)

    def fail(_reporter: JobReporter) -> None:
        raise UserError("this file is damaged", "x.safetensors", "Get it anew.")

    assert run_job(job.path, fail) == 3
    view = look_at_job(job)
    assert view.state == "failed"
    assert view.error == "this file is damaged (x.safetensors). Get it anew."
    with pytest.raises(UserError):
        run_job(None, fail)

    job.events_jsonl.write_text('{"kind": "started", "time": 1}\n')
    job.log.write_text("first\nKilled\n")
    view = look_at_job(job)
    assert (view.state, view.error) == ("crashed", "Killed")
    remove_job(job)
    assert list_jobs() == []


def test_cancelling_is_an_exception_of_its_own() -> None:
    reporter = JobReporter()
    reporter.progress(1, 2)
    assert not issubclass(JobCancelled, UserError)
