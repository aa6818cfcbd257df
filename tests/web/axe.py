"""The accessibility check of a page as a browser shows it, with axe-core (bundled in axe-playwright-python)."""

from __future__ import annotations

from typing import Any, Final

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.web.screenshots import show_scheme

Context = str | dict[str, list[str]] | None

SERIOUS: Final = ("serious", "critical")
# Faults inside gradio's own components, which the page cannot mend. Each with its reason; a new one needs one too.
EXCEPT_MESSAGES: Final = {"exclude": [".toast-wrap"]}
"""All but gradio's messages that pass by."""
OF_GRADIO: Final[dict[str, tuple[str, ...]]] = {}


def serious_faults(page: Page, context: Context = None) -> list[str]:
    """One line for each serious fault of what is shown now (within the selector `context`, by default everywhere)."""
    found: dict[str, Any] = Axe().run(page, context=context).response
    return [
        f"{fault['id']}: {fault['help']} at {' '.join(map(str, node['target']))}: {node['html'][:160]}"
        for fault in found["violations"]
        for node in fault["nodes"]
        if (node.get("impact") or fault["impact"]) in SERIOUS
        and not any(part in node["html"] for part in OF_GRADIO.get(fault["id"], ()))
    ]


def serious_faults_in_both_schemes(page: Page, context: Context = None) -> list[str]:
    """The same in light and in dark."""
    faults: list[str] = []
    for is_dark in (False, True):
        show_scheme(page, is_dark=is_dark)
        faults += [f"{'dark' if is_dark else 'light'}: {fault}" for fault in serious_faults(page, context)]
    show_scheme(page, is_dark=False)
    return faults
