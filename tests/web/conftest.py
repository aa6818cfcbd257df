"""The page's process and a browser that looks at it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.web.page_process import App


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    app = App(tmp_path_factory.mktemp("page") / "home", port)
    yield app
    app.end()


@pytest.fixture
def app(shared_app: App) -> Iterator[App]:
    """The page with an empty data folder. Its process is shared by a file's tests, unless one of them ends it."""
    app = shared_app
    if not app.is_as_started:
        app.end()
        app.start()
        app.is_as_started = True
    yield app
    for pid in app.worker_pids():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    if not app.is_as_started:
        app.end()
    for path in app.home.iterdir() if app.home.exists() else ():
        # A killed worker may write its last file while its folder is removed.
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


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
