"""Stopping, killing, resuming and deleting a run in a real browser: tiny models, the real trainer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from fluxgui.run_state import RunState, fold
from tests.runs.test_run_folder_worker import make_run
from tests.tiny import TinyModels
from tests.web.page_process import RUN_SECONDS, App, chip, steps_done, visit, wait_until
from tests.web.screenshots import shoot
from trainer.schema.events import EventWriter
from trainer.schema.run_folder import RunFolder

pytestmark = [pytest.mark.web, pytest.mark.slow, pytest.mark.timeout(1200)]

WAIT_MS = RUN_SECONDS * 1000


def train(app: App, models: TinyModels, page: Page) -> Path:
    """A run of far too many steps, shown on the page while it trains."""
    run = make_run(models, app.home)
    visit(page, app, f"?tab=runs&run={run.path.name}")
    expect(page.locator("#run-header .doing")).to_contain_text("Training, step", timeout=WAIT_MS)
    return run.path


def shorten(run: Path, num_steps: int) -> None:
    """The length may change under a constant rate: so the rest of the run does not take for ever."""
    config = (run / "config.toml").read_text("utf-8")
    assert "max_train_steps = 100000\n" in config
    (run / "config.toml").write_text(config.replace("= 100000\n", f"= {num_steps}\n"), "utf-8")


def steps_drawn(app: App, run: Path) -> list[int]:
    return [point.step for point in fold(RunState(), app.events(run)).points]


def test_a_run_is_stopped_resumed_and_completed(app: App, page: Page, tiny_models: TinyModels, tmp_path: Path) -> None:
    run = train(app, tiny_models, page)
    page.locator("#run-stop").click()
    expect(page.locator("#run-stop-question")).to_contain_text("Stop a test at step")
    page.locator("#run-stop-no").click()
    expect(page.locator("#run-stop-question")).to_be_hidden()
    expect(chip(page)).to_have_text("running")
    page.locator("#run-stop").click()
    page.locator("#run-stop-yes").click()
    expect(chip(page)).to_have_text("stopped")
    expect(page.locator("#run-header .doing")).to_contain_text("it can be resumed")
    done = steps_done(app, run)
    expect(page.locator("#run-waiting")).to_contain_text(f"Resume goes on in this run after step {done}")

    shorten(run, done + 5)
    page.locator("#run-resume").click()
    # "starting" may be over before the browser looks again: only that the page leaves "stopped" at once is certain.
    expect(chip(page)).not_to_have_text("stopped")
    expect(page.locator("#run-resume")).to_be_hidden()
    expect(chip(page)).to_have_text("completed", timeout=WAIT_MS)
    assert steps_drawn(app, run) == list(range(1, done + 6)), "no gap, no double"
    expect(page.locator("#run-plot polyline.raw")).to_be_attached()
    expect(page.locator("#run-resume")).to_be_hidden()
    expect(page.locator("#run-checkpoints li", has_text="final")).to_contain_text("lora.safetensors")
    shoot(page, "story-08-stopped-and-resumed", tmp_path)


def test_a_run_is_deleted_after_a_question_that_names_what_is_lost(app: App, page: Page) -> None:
    made = RunFolder.create(
        app.home / "runs", "cat", config_toml="", dataset_toml="", sample_prompts="", info={"name": "cat"}
    )
    (made.checkpoints_dir / "cat.safetensors").write_bytes(bytes(2_000_000))
    (made.state_dir / "step-000007").mkdir(parents=True)
    events = EventWriter(made.events_jsonl, attempt=1)
    events.write("run_started", pid=0, device="cpu")
    events.write("run_finished", outcome="stopped", steps=7)
    visit(page, app, f"?tab=runs&run={made.path.name}")
    expect(chip(page)).to_have_text("stopped")
    expect(page.locator("#run-waiting")).to_contain_text("Resume goes on in this run after step 7")
    page.locator("#run-delete").click()
    question = page.locator("#run-delete-question")
    expect(question).to_contain_text("Delete cat? 1 saved LoRA, its log and its settings and the state to resume from")
    page.locator("#run-delete-no").click()
    expect(question).to_be_hidden()
    assert app.runs() == [made.path]
    page.locator("#run-delete").click()
    expect(question).to_be_visible()
    page.locator("#run-delete-yes").click()
    expect(page.get_by_text("No runs yet")).to_be_visible()
    assert app.runs() == []
    assert (app.home / "bin" / made.path.name / "checkpoints" / "cat.safetensors").stat().st_size == 2_000_000


def test_a_killed_run_is_resumed_from_what_was_kept_of_it(
    app: App, page: Page, tiny_models: TinyModels, tmp_path: Path
) -> None:
    run = train(app, tiny_models, page)
    wait_until(lambda: any((run / "state").glob("step-*")), RUN_SECONDS)
    (pid,) = app.worker_pids()
    os.kill(pid, signal.SIGKILL)
    expect(chip(page)).to_have_text("crashed")
    expect(page.locator("#run-messages .log-tail")).to_contain_text("step")
    expect(page.locator("#run-again")).to_be_visible()
    expect(page.locator("#run-stop")).to_be_hidden()
    shoot(page, "story-09-crashed", tmp_path)
    visit(page)
    expect(chip(page)).to_have_text("crashed")
    last_step = steps_done(app, run)
    shorten(run, last_step + 5)
    page.locator("#run-resume").click()
    expect(chip(page)).to_have_text("completed", timeout=WAIT_MS)
    first, second = (event for event in app.events(run) if event["kind"] == "plan")
    assert (first["first_step"], second["attempt"]) == (0, 2)
    assert 0 < int(str(second["first_step"])) <= last_step
    assert steps_drawn(app, run) == list(range(1, last_step + 6)), "no gap, no double"
