"""Pictures of the page as a story leaves it: wide and narrow, light and dark."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from playwright.sync_api import Page

WIDTHS: Final = (1280, 390)
HEIGHT: Final = 1000


def show_scheme(page: Page, *, is_dark: bool) -> None:
    """Light or dark, at once: colours that fade into one another have too little contrast on their way."""
    page.add_style_tag(content="* { transition: none !important; animation-duration: 0s !important; }")
    page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", is_dark)


def shoot(page: Page, name: str, folder: Path) -> None:
    """Four PNG files `NAME-WIDTH-SCHEME.png` of what the page shows now, each with all that is below the window too.

    They go to the folder that FLUXGUI_SCREENSHOTS names, or else to `folder`. The page is as before after it.
    """
    target = Path(os.environ.get("FLUXGUI_SCREENSHOTS") or folder)
    target.mkdir(parents=True, exist_ok=True)
    size = page.viewport_size
    was_dark = bool(page.evaluate("document.body.classList.contains('dark')"))
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": HEIGHT})
        for scheme in ("light", "dark"):
            show_scheme(page, is_dark=scheme == "dark")
            page.screenshot(path=target / f"{name}-{width}-{scheme}.png", full_page=True)
    show_scheme(page, is_dark=was_dark)
    if size is not None:
        page.set_viewport_size(size)
