"""No page has a serious accessibility fault, in wide and light or narrow and dark."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.web.axe import serious_faults
from tests.web.page_process import App

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]
TABS = ("train", "dataset", "runs", "library", "presets", "settings")


def test_axe_finds_no_serious_fault_on_any_page(app: App, page: Page) -> None:
    page.goto(app.url)
    page.locator("#pages").wait_for()
    faults: dict[str, list[str]] = {}
    for width, is_dark in ((1280, False), (390, True)):
        page.set_viewport_size({"width": width, "height": 1000})
        for tab in TABS:
            page.goto(f"{app.url}?tab={tab}")
            expect(page.locator("[role=tab].selected").first).to_be_attached()
            page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", is_dark)
            # Colours fade into one another; one on its way may have too little contrast.
            page.wait_for_timeout(1000)
            faults[f"{tab} at {width} px"] = serious_faults(page)
    assert {place: found for place, found in faults.items() if found} == {}
