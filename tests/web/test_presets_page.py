"""The Presets and Settings pages in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.fluxgui.test_importing import EXAMPLE
from tests.tiny import TinyModels
from tests.tools.fake_hub import FakeHub
from tests.tools.test_get_models import DEV, published
from tests.web.axe import EXCEPT_MESSAGES, serious_faults_in_both_schemes
from tests.web.page_process import App, visit, wait_until
from tests.web.screenshots import shoot
from trainer.schema.cli import parse_command_line
from trainer.schema.events import EventWriter
from trainer.schema.import_project import import_project
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_liveness import WorkerLock
from trainer.schema.shell_words import read_training_command
from trainer.tools.tiny_models import make_images

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]


def choose(page: Page, field: str, option: str) -> None:
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_story_7_a_pasted_command_is_shown_and_goes_out_as_an_equal_one(page: Page, app: App, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 2)
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n'
        f"image_dir = '{tmp_path / 'images'}'\nnum_repeats = 7\n",
        encoding="utf-8",
    )
    command = EXAMPLE.replace("my_flux_dataset_config.toml", str(dataset)).rstrip() + "\n  --unheard_of=3\n"
    visit(page, app, "?tab=presets")
    page.locator("#import-text textarea").fill(command)
    page.locator("#import-read").click()
    result = page.locator("#import-result")
    expect(result).to_contain_text("--unheard_of=3: there is no such option.")
    expect(result).to_contain_text("network_dim")
    shoot(page, "story-07-pasted-command", tmp_path)
    assert serious_faults_in_both_schemes(page, EXCEPT_MESSAGES) == []

    choose(page, "export-format", "Command line (bash)")
    page.locator("#export-write").click()
    exported = page.locator("#export-text textarea")
    expect(exported).to_have_value(re.compile("--network_dim=16"))
    words = read_training_command(exported.input_value()).words
    assert parse_command_line(words).options == import_project(command).options

    page.locator("#import-fill").click()
    expect(page.locator("#import-left-out")).to_contain_text("/data/output dir")
    page.get_by_role("tab", name="Train").click()
    shown = {
        "output_name": "my_flux_lora",
        "network_dim": "16",
        "num_repeats": "7",
        "image_dir": str(tmp_path / "images"),
    }
    for name, value in shown.items():
        expect(page.locator(f"#field-{name}").locator("input, textarea").first).to_have_value(value)


def test_a_preset_is_copied_renamed_deleted_and_taken_back(page: Page, app: App, tmp_path: Path) -> None:
    visit(page, app, "?tab=presets")
    choose(page, "presets-list", "Built in, purpose: Style")
    expect(page.locator("#presets-details")).to_contain_text("network_dim")
    page.locator("#presets-rename").click()
    expect(page.get_by_text("is built in and stays as it is").first).to_be_visible()
    page.locator("#presets-name").locator("input, textarea").first.fill("my style")
    page.locator("#presets-duplicate").click()
    chosen = page.locator("#presets-list input")
    expect(chosen).to_have_value("My own: my style")
    page.locator("#presets-name").locator("input, textarea").first.fill("oils")
    page.locator("#presets-rename").click()
    expect(chosen).to_have_value("My own: oils")
    with page.expect_download() as download:
        page.locator("#presets-export").click()
    assert download.value.suggested_filename == "oils.toml"
    shoot(page, "presets", tmp_path)
    page.locator("#presets-delete").click()
    expect(page.locator("#presets-undo")).to_be_visible()
    assert not (app.home / "presets" / "oils.toml").exists()
    page.locator("#presets-undo").click()
    expect(chosen).to_have_value("My own: oils")
    assert (app.home / "presets" / "oils.toml").exists()
    page.locator("#presets-load").click()
    expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
    # A built-in one is shown as the answer that it is.
    for title, place, value in (
        ("Built in, purpose: Style", "#preset-purpose input:checked", "style"),
        ("Built in, memory of the card: 12 GB", "#vram-gb input", "12"),
    ):
        page.get_by_role("tab", name="Presets").click()
        choose(page, "presets-list", title)
        page.locator("#presets-load").click()
        expect(page.locator(place)).to_have_value(value)


def test_settings_are_kept_the_token_never_shown_and_the_language_changes_with_a_restart(
    page: Page, app: App, tmp_path: Path
) -> None:
    visit(page, app, "?tab=settings")
    expect(page.locator("#settings-about")).to_contain_text("gradio")
    expect(page.locator("#settings-token-status")).to_contain_text("There is no token.")
    page.locator("#settings-token input").fill("hf_very_secret")
    page.locator("#settings-token-keep").click()
    expect(page.locator("#settings-token-status")).to_contain_text("A token is kept.")
    expect(page.locator("#settings-token input")).to_have_value("")
    assert (app.home / "hub_token").stat().st_mode & 0o777 == 0o600

    page.locator("#settings-theme").get_by_text("Dark").click()
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
    models = page.locator("#settings-models_dir").locator("input, textarea").first
    models.fill("relative")
    page.locator("#settings-save-folders").click()
    expect(page.get_by_text("relative is no whole path").first).to_be_visible()
    models.fill(str(app.home / "elsewhere"))
    page.locator("#settings-save-folders").click()
    expect(page.get_by_text("Saved.").first).to_be_visible()
    page.locator("#settings-doctor").click()
    expect(page.locator("#settings-findings")).to_contain_text("All packages are there")
    shoot(page, "settings", tmp_path)
    assert serious_faults_in_both_schemes(page, EXCEPT_MESSAGES) == []
    choose(page, "settings-language", "中文")
    wait_until(lambda: 'language = "zh"' in (app.home / "settings.toml").read_text("utf-8"))

    page.goto("about:blank")  # a page that loses its server reloads itself when it is back
    app.kill()
    app.start()
    visit(page, app, "?tab=settings")
    expect(page.get_by_role("tab", name="设置")).to_be_visible()
    expect(page.locator("#settings-models_dir").locator("input, textarea").first).to_have_value(
        str(app.home / "elsewhere")
    )
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
    assert "hf_very_secret" not in page.content()
    assert "hf_very_secret" not in (app.home / "settings.toml").read_text("utf-8")


def test_the_browser_tells_when_a_run_ends(page: Page, app: App) -> None:
    page.add_init_script(
        "window.told = []; window.Notification = class { constructor(title, more) { window.told.push(more.body); }"
        " static permission = 'granted'; static requestPermission() { return Promise.resolve('granted'); } };"
    )
    run = RunFolder.create(
        app.home / "runs", "cat", config_toml="", dataset_toml="", sample_prompts="", info={"request": None}
    )
    lock = WorkerLock(run)
    lock.acquire()  # a trainer is at work, as far as the page can see
    visit(page, app, "?tab=settings")
    expect(page.locator("#settings-about")).to_contain_text("gradio")  # what is set has arrived
    with page.expect_response(lambda answer: answer.url.endswith("/run-states")):
        page.locator("#settings-notify input").check()
    events = EventWriter(run.events_jsonl, 1)
    events.write("run_finished", outcome="completed", steps=3)
    lock.release()
    page.wait_for_function("window.told.length > 0")
    assert page.evaluate("window.told") == ["cat: completed"]


def test_the_models_are_downloaded_found_and_put_into_the_form(
    page: Page, app: App, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with FakeHub(published(tiny_models), frozenset({DEV}), pace=5.0) as hub:
        app.kill()
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        app.start()
        visit(page, app)
        page.locator("#to-models").click()
        progress = page.locator("#models-progress")
        page.locator("#models-get").click()
        expect(progress).to_contain_text("Accept the licence at")
        page.locator("#settings-token input").fill("hf_right")
        page.locator("#settings-token-keep").click()
        expect(page.locator("#settings-token-status")).to_contain_text("A token is kept.")
        page.locator("#models-get").click()
        page.locator("#models-cancel").click()
        expect(progress).to_contain_text("What has arrived is kept")
        hub.pace = 0.0
        page.locator("#models-get").click()
        expect(progress).to_contain_text("All four files are there.")
        expect(page.locator("#models-ae input")).to_have_value(re.compile("ae.safetensors"))
        shoot(page, "models-downloaded", tmp_path)
        page.locator("#models-use").click()
    shown = page.locator("#field-ae").locator("input, textarea").first
    expect(shown).to_have_value(str(app.home / "models" / "ae.safetensors"))
    assert "ae.safetensors" in (app.home / "settings.toml").read_text("utf-8")
