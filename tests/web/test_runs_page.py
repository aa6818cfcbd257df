"""The Runs page in a real browser: the queue with real trainers, and everything there is to look at in ended runs."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from fluxgui.runs import RunWatcher
from tests.fluxgui.ended_run import make_ended_run
from tests.runs.test_run_folder_worker import make_run
from tests.tiny import TinyModels
from tests.web.page_process import RUN_SECONDS, App, chip, visit, wait_until
from tests.web.screenshots import shoot
from trainer.schema.run_folder import RunFolder

pytestmark = [pytest.mark.web, pytest.mark.slow, pytest.mark.timeout(900)]

WAIT_MS = RUN_SECONDS * 1000


def state(run: RunFolder) -> str:
    return RunWatcher().look(run).status.state


def card(page: Page, run: RunFolder) -> str:
    return f'.run-card[data-run="{run.path.name}"]'


def test_the_second_run_waits_is_moved_taken_out_and_starts_when_the_first_ends(
    app: App, page: Page, tiny_models: TinyModels, tmp_path: Path
) -> None:
    first, second, third = (make_run(tiny_models, app.home) for _ in range(3))
    visit(page, app, f"?tab=runs&run={second.path.name}")
    expect(page.locator("#run-queue li")).to_have_count(2, timeout=WAIT_MS)
    expect(chip(page)).to_have_text("queued")
    expect(page.locator("#run-queue")).to_contain_text("At work: a test.")
    assert (state(second), state(third)) == ("queued", "queued")

    order = page.locator('#run-queue li button[data-action="cancel"]')
    assert order.evaluate_all("all => all.map(b => b.dataset.run)") == [second.path.name, third.path.name]
    # By keyboard, and the focus stays on the moved run.
    page.locator(f'#run-queue button[data-action="up"][data-run="{third.path.name}"]').press("Enter")
    expect(order.first).to_have_attribute("data-run", third.path.name)
    visit(page)
    expect(order.first).to_have_attribute("data-run", third.path.name)
    shoot(page, "story-11-queue", tmp_path)
    page.locator(f'#run-queue button[data-action="cancel"][data-run="{third.path.name}"]').click()
    expect(page.locator("#run-queue li")).to_have_count(1)
    page.locator(card(page, third)).click()
    expect(page.locator("#run-header .doing")).to_contain_text("Taken out of the queue")
    expect(page).to_have_url(re.compile(f"run={third.path.name}$"))

    # The queue outlives the program; nothing starts while it is not there, and the running one does not care.
    page.goto("about:blank")
    app.kill()
    app.start()
    assert (state(first), state(second)) == ("running", "queued")
    visit(page, app, f"?tab=runs&run={first.path.name}")
    expect(page.locator("#run-header .doing")).to_contain_text("Training, step", timeout=WAIT_MS)
    expect(page.locator("#run-system")).to_contain_text("Memory")
    page.locator("#run-stop").click()
    page.locator("#run-stop-yes").click()
    expect(chip(page)).to_have_text("stopped")
    page.goto("about:blank")  # nobody looks
    wait_until(lambda: state(second) == "running", RUN_SECONDS)
    assert state(third) == "stopped"
    second.send_command("stop")
    wait_until(lambda: state(second) == "stopped", RUN_SECONDS)


def test_ended_runs_are_found_looked_at_compared_taken_away_and_used_again(
    app: App, page: Page, tmp_path: Path
) -> None:
    small = make_ended_run(app.home / "runs", "cat-small", learning_rate=1e-4)
    large = make_ended_run(app.home / "runs", "cat-large", learning_rate=2e-4)
    visit(page, app, f"?tab=runs&run={small.path.name}")
    expect(page.locator(".run-card")).to_have_count(2)
    expect(page.locator(card(page, small))).to_have_attribute("aria-current", "true")
    pictures = page.locator(".run-card img")
    wait_until(lambda: bool(pictures.evaluate_all("all => all.length == 2 && all.every(i => i.naturalWidth > 0)")))

    # A large sample over that of an earlier step.
    page.locator("#run-samples a[data-large]").first.click()
    dialog = page.locator("dialog.sample-large")
    expect(dialog).to_contain_text("step 80: a cat")
    before = dialog.locator("img.before")
    assert "inset(0px 50% 0px 0px)" in before.evaluate("i => getComputedStyle(i).clipPath")
    dialog.locator("input[type=range]").press("Home")
    assert "inset(0px 100% 0px 0px)" in before.evaluate("i => getComputedStyle(i).clipPath")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)

    # Closer, by levels, and back.
    steps = page.locator("#run-plot .plot-x span")
    svg = page.locator("#run-plot svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.up()
    expect(steps.first).to_have_text("step 20")
    expect(steps.last).to_have_text("40")
    page.get_by_label("Loss by noise level").check()
    expect(page.locator("#run-plot polyline")).to_have_count(4)
    page.get_by_role("button", name="Whole run").click()
    expect(steps.last).to_have_text("80")
    page.get_by_label("Learning rate", exact=True).check()
    expect(page.locator("#run-plot polyline")).to_have_count(1)

    # Notes are kept, and found.
    page.locator("#run-notes textarea").fill("whiskers are good")
    page.locator("#run-notes textarea").blur()
    wait_until(lambda: (small.path / "notes.txt").exists())
    page.locator("#run-search textarea, #run-search input").fill("whiskers")
    expect(page.locator(".run-card")).to_have_count(1)
    page.locator("#run-search textarea, #run-search input").fill("")
    expect(page.locator(".run-card")).to_have_count(2)

    page.get_by_text("Compare with other runs", exact=True).click()
    page.locator("#run-compared input").click()
    page.get_by_role("option", name=re.compile("^cat-large")).click()
    page.keyboard.press("Escape")
    compared = page.locator("#run-comparison")
    expect(compared.locator("polyline")).to_have_count(2)
    expect(compared.locator("tbody tr", has_text="learning_rate")).to_contain_text("0.0002")
    expect(compared.locator("tbody tr")).to_have_count(1)
    expect(compared.locator(".samples section").first.locator("img")).to_have_count(2)

    shoot(page, "story-13-comparison", tmp_path)

    page.get_by_text("Log", exact=True).click()
    page.get_by_label("Warnings and errors").check()
    expect(page.locator("#run-log pre")).to_have_text("2026-01-01 10:00:00 WARNING 2 captions are empty")

    with page.expect_download() as waiting:
        page.get_by_text("Everything as a zip").click()
    waiting.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(io.BytesIO((tmp_path / "all.zip").read_bytes())) as archive:
        assert archive.testzip() is None
        names = {name.removeprefix(f"{small.path.name}/") for name in archive.namelist()}
    assert {"config.toml", "notes.txt", "checkpoints/cat-small.safetensors", "events.jsonl"} <= names
    assert not any(name.startswith("state/") for name in names)
    with page.expect_download() as waiting:
        page.get_by_text("Report as one HTML file").click()
    waiting.value.save_as(tmp_path / "report.html")
    told = page.context.new_page()
    told.goto((tmp_path / "report.html").as_uri())
    expect(told.locator("body")).to_contain_text("whiskers are good")
    assert told.locator("img").evaluate_all("all => all.length > 3 && all.every(i => i.naturalWidth > 0)")
    told.close()

    page.locator(card(page, large)).click()
    expect(page.locator("#run-header h2")).to_have_text("cat-large")
    page.locator("#run-duplicate").click()
    expect(page.locator("#start")).to_be_visible()
    expect(page.locator("#field-learning_rate").locator("input, textarea").first).to_have_value("0.0002")
    expect(page.locator("#field-output_name").locator("input, textarea").first).to_have_value("cat-large")
