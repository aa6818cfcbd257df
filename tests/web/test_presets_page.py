"""The Presets and Settings pages in a browser."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.fluxgui.test_importing import EXAMPLE
from tests.web.page_process import App
from trainer.schema.cli import parse_command_line
from trainer.schema.import_project import import_project
from trainer.schema.shell_words import read_training_command
from trainer.tools.tiny_models import make_images

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]

SHOTS = os.environ.get("FLUXGUI_SCREENSHOTS")


def shoot(page: Page, name: str) -> None:
    """A picture of the page, where FLUXGUI_SCREENSHOTS names a folder, wide and narrow, light and dark."""
    if not SHOTS:
        return
    for scheme in ("light", "dark"):
        page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", scheme == "dark")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(200)
            page.screenshot(path=str(Path(SHOTS) / f"{name}-{width}-{scheme}.png"), full_page=True)
    page.evaluate("document.body.classList.remove('dark')")
    page.set_viewport_size({"width": 1280, "height": 1000})


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
    page.goto(app.url + "?tab=presets")
    page.locator("#import-text textarea").fill(command)
    page.locator("#import-read").click()
    result = page.locator("#import-result")
    expect(result).to_contain_text("--unheard_of=3: there is no such option.")
    expect(result).to_contain_text("network_dim")
    shoot(page, "presets-import")

    choose(page, "export-format", "Command line (bash)")
    page.locator("#export-write").click()
    exported = page.locator("#export-text textarea")
    expect(exported).to_have_value(re.compile("--network_dim=16"))
    words = read_training_command(exported.input_value()).words
    assert parse_command_line(words).options == import_project(command).options

    page.locator("#import-fill").click()
    expect(page.locator("#import-left-out")).to_contain_text("/work/output dir")
    page.get_by_role("tab", name="Train").click()
    shown = {
        "output_name": "my_flux_lora",
        "network_dim": "16",
        "num_repeats": "7",
        "image_dir": str(tmp_path / "images"),
    }
    for name, value in shown.items():
        expect(page.locator(f"#field-{name}").locator("input, textarea").first).to_have_value(value)


def test_a_preset_is_copied_renamed_deleted_and_taken_back(page: Page, app: App) -> None:
    page.goto(app.url + "?tab=presets")
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
    shoot(page, "presets")
    page.locator("#presets-delete").click()
    expect(page.locator("#presets-undo")).to_be_visible()
    assert not (app.home / "presets" / "oils.toml").exists()
    page.locator("#presets-undo").click()
    expect(chosen).to_have_value("My own: oils")
    assert (app.home / "presets" / "oils.toml").exists()
    page.locator("#presets-load").click()
    expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
