"""No page has a serious accessibility fault, in wide and light or narrow and dark."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.web.axe import serious_faults
from tests.web.page_process import App, visit
from tests.web.screenshots import show_scheme

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]
TABS = ("train", "dataset", "runs", "library", "presets", "settings")


def test_axe_finds_no_serious_fault_on_any_page(app: App, page: Page) -> None:
    faults: dict[str, list[str]] = {}
    for tab in TABS:
        visit(page, app, f"?tab={tab}")
        expect(page.locator("[role=tab].selected").first).to_be_attached()
        for width, is_dark in ((1280, False), (390, True)):
            page.set_viewport_size({"width": width, "height": 1000})
            show_scheme(page, is_dark=is_dark)
            faults[f"{tab} at {width} px"] = serious_faults(page)
    assert {place: found for place, found in faults.items() if found} == {}
