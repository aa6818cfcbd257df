"""No page has a serious accessibility fault, in light or dark, wide or narrow."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page

from tests.web.axe import serious_faults_in_both_schemes
from tests.web.page_process import App

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]


def test_axe_finds_no_serious_fault_on_any_page(app: App, page: Page) -> None:
    page.goto(app.url)
    page.locator("#pages").wait_for()
    tabs = page.locator("#pages > .tab-wrapper [role=tab]:visible")
    faults: dict[str, list[str]] = {}
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 1000})
        for number in range(tabs.count()):
            tab = tabs.nth(number)
            tab.click()
            page.wait_for_timeout(500)
            faults[f"{tab.text_content()} at {width} px"] = serious_faults_in_both_schemes(page)
    assert len(faults) >= 4, "there are at least two pages"
    print("\n".join(f"{place} | {fault}" for place, found in faults.items() for fault in found))
    assert {place: found for place, found in faults.items() if found} == {}
