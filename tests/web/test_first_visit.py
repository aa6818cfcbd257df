"""The first visit: the demo from its button to the downloaded file, with the browser and the page dying in between."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from safetensors import safe_open

from tests.shared_demo import DemoFiles, SharedDemo
from tests.web.page_process import RUN_SECONDS, START_MS, App, chip, steps_done, visit, wait_until
from tests.web.screenshots import shoot
from trainer.tools.demo_page import samples_by_moment
from trainer.tools.emblem import RECOGNISED, emblem_likeness

pytestmark = [pytest.mark.web, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_the_demo_from_the_first_visit_to_the_downloaded_file(
    app: App, page: Page, tmp_path: Path, shared_demo: SharedDemo
) -> None:
    visit(page, app)
    page.locator("#try-demo").click()
    expect(page).to_have_url(re.compile(r"tab=runs.*run=2"), timeout=START_MS)
    (run,) = app.runs()
    expect(page.locator("#run-header h2")).to_have_text("demo")
    expect(page.locator("#run-header .doing")).to_contain_text("Training, step", timeout=START_MS)

    # The buttons reach the worker.
    page.locator("#run-pause").click()
    expect(chip(page)).to_have_text("paused")
    expect(page.locator("#run-pause")).to_have_text("Resume")
    page.locator("#run-pause").click()
    expect(chip(page)).to_have_text("running")
    page.locator("#run-save").click()
    expect(page.locator("#run-checkpoints a.download").first).to_be_visible()
    page.locator("#run-sample").click()
    expect(page.locator("#run-samples img").first).to_be_visible(timeout=START_MS)
    shoot(page, "story-12-saved-and-sampled", tmp_path)

    # The page dies; training does not, and a new page shows it again.
    before, address = steps_done(app, run), page.url
    page.goto("about:blank")  # a page that loses its server reloads itself when it is back
    app.kill()
    wait_until(lambda: steps_done(app, run) > before + 2, 60)
    app.start()
    visit(page, app, "?" + address.partition("?")[2])
    expect(page.locator("#run-header h2")).to_have_text("demo")
    expect(chip(page)).to_have_text(re.compile("running|completed"))
    shoot(page, "story-10-program-restarted", tmp_path)

    expect(chip(page)).to_have_text("completed", timeout=RUN_SECONDS * 1000)
    plan = next(event for event in app.events(run) if event["kind"] == "plan")
    assert steps_done(app, run) == plan["num_steps"]
    shared_demo.leave(DemoFiles(run / "checkpoints" / "demo.safetensors", run / "samples"))
    expect(page.locator("#run-plot polyline.raw")).to_be_attached()
    expect(page.locator("#run-plot polyline.smooth")).to_be_attached()
    pictures = page.locator("#run-samples section img")
    pictures.last.scroll_into_view_if_needed()
    wait_until(lambda: bool(pictures.evaluate_all("all => all.length > 1 && all.every(i => i.naturalWidth == 96)")))

    # The concept appears: the first two sample prompts have its trigger word, the others have not.
    moments = samples_by_moment(run / "samples")
    at_first, *_, at_last = [[emblem_likeness(picture) for picture in row] for row in moments.values()]
    assert max(at_first) < RECOGNISED
    assert min(at_last[:2]) > RECOGNISED
    assert max(at_last[2:]) < RECOGNISED

    shoot(page, "story-01-demo-completed", tmp_path)

    final = page.locator("#run-checkpoints li", has_text="final").locator("a.download")
    with page.expect_download() as waiting:
        final.click()
    saved = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(saved)
    assert saved.name == "demo.safetensors"
    with safe_open(saved, "pt") as file:
        names = list(file.keys())
        assert len(names) > 10
        assert all(file.get_tensor(name).isfinite().all() for name in names)
        assert any(file.get_tensor(name).abs().max() > 0 for name in names if "lora_up" in name)
