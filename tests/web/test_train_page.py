"""The Train page: what a card can and cannot do, the way by keyboard alone, and what an empty page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.fluxgui.sparse_flux import make_sparse_flux
from tests.web.page_process import App, visit
from tests.web.screenshots import shoot
from trainer.tools.tiny_pictures import make_images

pytestmark = [pytest.mark.web, pytest.mark.timeout(600)]
MAX_TABS = 60
HUMAN_MS = 1500
"""Between two actions of which the first is answered by several steps on the server."""

# Whether the eye sees where the keyboard is: the element, or what is around it, looks different without the focus.
FOCUS_IS_SEEN = """() => {
    const focused = document.activeElement;
    // While a part of the page is drawn anew, the keyboard is at no control; the next Tab goes on from there.
    if (focused === document.body) return true;
    const look = () => {
        const looks = [];
        for (let at = focused, up = 0; at && up < 4; at = at.parentElement, up++) {
            const style = getComputedStyle(at);
            looks.push(style.outline, style.boxShadow, style.borderColor, style.backgroundColor);
        }
        return looks.join("|");
    };
    const still = document.createElement("style");
    still.textContent = "* { transition: none !important; }";
    document.head.append(still);
    const seen = look();
    focused.blur();
    const unseen = look();
    focused.focus({ focusVisible: true });
    still.remove();
    return seen !== unseen;
}"""
FOCUS = "() => document.activeElement.outerHTML.slice(0, 120)"


def box(page: Page, name: str) -> Locator:
    return page.locator(f"#field-{name}").locator("input, textarea").first


def open_page(page: Page, app: App) -> None:
    visit(page, app)
    expect(box(page, "network_dim")).not_to_have_value("")


def choose(page: Page, dropdown: str, text: str) -> None:
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=text, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)


def tab_to(page: Page, selector: str) -> list[str]:
    """Press Tab until the keyboard is at `selector`; gives the elements on the way whose focus cannot be seen."""
    unseen: list[str] = []
    for _ in range(MAX_TABS):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            # The page's check has just put another list in place of the focused link; Tab goes on from there.
            continue
        if not page.evaluate(FOCUS_IS_SEEN):
            unseen.append(page.evaluate(FOCUS))
        if page.evaluate("(selector) => document.activeElement.closest(selector) !== null", selector):
            return unseen
    raise AssertionError(f"{selector} is not reached by {MAX_TABS} presses of Tab")


def test_a_small_card_swaps_blocks_and_a_smaller_one_says_what_is_impossible(
    app: App, page: Page, tmp_path: Path
) -> None:
    flux = make_sparse_flux(app.home / "models" / "flux1-dev.safetensors")
    make_images(app.home / "cats", 12)
    open_page(page, app)
    box(page, "pretrained_model_name_or_path").fill(str(flux))
    box(page, "image_dir").fill(str(app.home / "cats"))
    expect(page.locator("#length")).to_contain_text("12 pictures x 10 = about 120 steps an epoch; 10 epochs")
    page.locator("#ram-gb input").fill("64")

    # 8 GB: blocks are filled in, with what they cost, and the time of all steps.
    choose(page, "#preset-vram", "8 GB")
    result = page.locator("#estimate-result")
    expect(result.locator(".box.good")).to_contain_text("wait in main memory")
    expect(result).to_contain_text(re.compile(r"Expected time: about .* \(1200 steps of "))
    expect(box(page, "blocks_to_swap")).to_have_value(re.compile(r"^[1-9]\d?$"))
    expect(result.locator(".memory-legend").first).to_contain_text("Activations")

    # Leaving the list with the same card is no choice: what was set by hand stays.
    box(page, "blocks_to_swap").fill("36")
    old = page.locator("#estimate-is-old")
    expect(old).to_contain_text("Settings have changed")
    page.locator("#preset-vram input").focus()
    page.keyboard.press("Tab")
    page.wait_for_timeout(HUMAN_MS)  # nothing is to happen: there is no answer to wait for
    expect(box(page, "blocks_to_swap")).to_have_value("36")
    expect(old).to_contain_text("Settings have changed")

    # 4 GB at 1024 pixels: no, why not, and what would fit instead.
    box(page, "resolution").fill("1024")
    page.locator("#vram-gb input").fill("4")
    page.locator("#estimate").click()
    expect(result.locator(".box.bad")).to_contain_text("a card of 4.0 GiB leaves 3.8 GiB")
    expect(result.locator(".memory-legend").first).to_contain_text("too much")
    shoot(page, "story-05-estimate", tmp_path)
    page.locator("#estimate-alternatives label").first.click()
    # Only if all of it was filled in, also what has no field of its own, does the next estimate fit.
    expect(result.locator(".box.good")).to_contain_text("of 4.0 GiB")

    # Shorter and longer, and by hand.
    page.wait_for_timeout(HUMAN_MS)
    page.locator("#train-length label", has_text="Long").click()
    expect(box(page, "max_train_epochs")).to_have_value("20")
    box(page, "max_train_epochs").fill("7")
    expect(page.locator("#length")).to_contain_text("7 epochs = about 840 steps")
    expect(page.locator("#train-length input:checked")).to_have_count(0)
    page.reload()
    expect(box(page, "max_train_epochs")).to_have_value("7")
    expect(page.locator("#preset-purpose input:checked")).to_have_value("character")


def test_an_empty_page_says_what_to_do_and_start_leads_to_the_first_problem(app: App, page: Page) -> None:
    open_page(page, app)
    expect(page.locator("#model-none")).to_contain_text("No model yet")
    expect(page.locator("#pictures-none")).to_contain_text("No pictures yet")
    expect(page.locator("#card-seen")).not_to_be_empty()
    (app.home / "nothing").mkdir(parents=True)
    box(page, "image_dir").fill(str(app.home / "nothing"))
    expect(page.locator("#field-image_dir.field-bad")).to_be_visible()
    box(page, "image_dir").fill("")
    box(page, "network_dim").fill("0")
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator("#start").click()
    first = page.locator("#field-pretrained_model_name_or_path")
    expect(first).to_contain_text("Needed")
    expect(first.locator("input, textarea")).to_be_focused()
    expect(first).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing reaches out to the right"


@pytest.mark.parametrize("width", [1280, 390])
def test_from_the_model_to_a_started_run_by_keyboard_alone(app: App, page: Page, tmp_path: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    open_page(page, app)
    unseen = tab_to(page, "#use-demo")
    page.keyboard.press("Enter")
    expect(box(page, "output_name")).to_have_value("demo")
    expect(page.locator("#problems .good")).to_be_visible()
    unseen += tab_to(page, "#field-image_dir")
    unseen += tab_to(page, "#preset-purpose")
    unseen += tab_to(page, "#preset-vram")
    unseen += tab_to(page, "#train-length")
    page.keyboard.press("Space")
    expect(page.locator("#train-length input:checked")).to_have_count(1)
    unseen += tab_to(page, "#field-output_name")
    page.wait_for_timeout(HUMAN_MS)
    page.keyboard.press("Control+a")
    page.keyboard.type("by keyboard")
    expect(box(page, "output_name")).to_have_value("by keyboard")
    expect(page.locator("#problems .good")).to_be_visible()
    unseen += tab_to(page, "#start")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"tab=runs.*run=2"))
    expect(page.locator("#run-header h2")).to_have_text("by keyboard")
    shoot(page, f"story-16-by-keyboard-at-{width}", tmp_path)
    assert unseen == []
