"""The form of all options in the browser: five of them changed, found again, one reset, saved, and there after a reload."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.web.page_process import App, visit
from tests.web.screenshots import shoot

pytestmark = [pytest.mark.web, pytest.mark.slow, pytest.mark.timeout(600)]

CHANGED = {
    "keep_tokens": ("1", "keep_tokens = 1"),
    "min_timestep": ("100", "min_timestep = 100"),
    "caption_prefix": ('a "red" hat, ', 'caption_prefix = "a \\"red\\" hat,"'),
    "network_args": (
        "rank_dropout=0.1\nloraplus_lr_ratio=4",
        'network_args = ["rank_dropout=0.1", "loraplus_lr_ratio=4"]',
    ),
    "color_aug": ("", "color_aug = true"),
}


def test_changed_options_are_found_reset_saved_and_loaded(app: App, page: Page, tmp_path: Path) -> None:
    visit(page, app)
    page.locator("#all-options > button, #all-options .label-wrap").first.click()
    rows = page.locator(".all-options .option")
    expect(rows.first).to_be_attached()

    def row(name: str) -> Locator:
        return page.locator(f'.option[data-name="{name}"]')

    for name, (text, _) in CHANGED.items():
        page.locator("#options-search").fill(name.replace("_", " "))
        expect(row(name)).to_be_visible()
        control = page.locator(f"#option-{name}")
        if text:
            control.fill(text)
            control.blur()
        else:
            control.check()
    lines = page.locator("#field-more_options textarea")
    for _, line in CHANGED.values():
        assert line in lines.input_value().split("\n")

    page.locator("#options-search").fill("")
    page.locator("#options-changed").check()
    expect(page.locator(".option:visible")).to_have_count(5)
    expect(page.locator("#options-status")).to_have_text("Changed: 5")
    row("min_timestep").get_by_role("button", name="Reset min_timestep").click()
    expect(page.locator(".option:visible")).to_have_count(4)
    assert "min_timestep" not in lines.input_value()
    # What an option does without effect says why; it cannot be answered.
    page.locator("#options-changed").uncheck()
    page.locator("#options-search").fill("xformers")
    expect(row("xformers").locator(".options-note")).to_contain_text("without effect")
    expect(row("xformers").locator("input")).to_have_count(0)

    page.get_by_role("button", name="My presets").click()
    page.locator("#preset-name input, #preset-name textarea").first.fill("mine")
    page.locator("#preset-save").click()
    expect(page.locator("#preset-own input")).to_have_value("mine")
    lines.fill("")
    expect(page.locator("#options-status")).to_have_text("Changed: 0")
    visit(page)
    page.get_by_role("button", name="My presets").click()
    page.locator("#preset-own input").click()
    page.get_by_role("option", name="mine", exact=True).click()
    page.locator("#preset-load").click()
    page.locator("#all-options > button, #all-options .label-wrap").first.click()
    expect(page.locator("#options-status")).to_have_text(re.compile("4"))
    expect(page.locator("#option-keep_tokens")).to_have_value("1")
    expect(page.locator("#option-network_args")).to_have_value("rank_dropout=0.1\nloraplus_lr_ratio=4")
    expect(page.locator("#option-color_aug")).to_be_checked()
    if not page.locator("#options-changed").is_visible():
        page.locator("#all-options > button, #all-options .label-wrap").first.click()
    page.locator("#options-changed").check()
    shoot(page, "story-06-changed-options", tmp_path)
