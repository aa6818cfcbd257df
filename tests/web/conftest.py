"""The page's process and a browser that looks at it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.web.page_process import App


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    app = App(tmp_path / "home", port)
    app.start()
    yield app
    for process in app.processes:
        process.kill()
        process.communicate()
    for pid in app.worker_pids():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, app: App) -> Iterator[Page]:
    """A page that fails the test when a script fails on it or when it asks another machine for anything."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    # A busy machine with two cores answers late; what never comes fails all the same.
    expect.set_options(timeout=60_000)
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on(
        "request",
        lambda r: failures.append(r.url) if not r.url.startswith((app.url, "data:", "blob:", "about:")) else None,
    )
    yield page
    context.close()
    assert failures == []
