"""The page as a process of its own, and what tests ask of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Locator, Page

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 900
START_MS = 300_000
"""From the click to the first step: models are copied, text and pictures encoded, samples made, on a machine that may
be busy with other tests."""


@dataclass
class App:
    """`app.py` as a process of its own, which a test may end and start again at the same address."""

    home: Path
    port: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    is_as_started: bool = False
    """No test has ended this process, which another one may use then."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--no-browser", "--port", str(self.port)],
            cwd=ROOT,
            env={**os.environ, "FLUXGUI_HOME": str(self.home), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert "FluxGUI is at" in process.stdout.readline()

    def kill(self) -> None:
        self.is_as_started = False
        process = self.processes.pop()
        process.kill()
        process.communicate()

    def end(self) -> None:
        while self.processes:
            self.kill()

    def runs(self) -> list[Path]:
        return sorted((self.home / "runs").glob("2*"))

    def events(self, run: Path) -> list[dict[str, object]]:
        file = run / "events.jsonl"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def worker_pids(self) -> list[int]:
        started = [event for run in self.runs() for event in self.events(run) if event["kind"] == "run_started"]
        # Never 0, which would mean the test's own process group.
        return [pid for event in started if (pid := int(str(event["pid"]))) > 0]


def visit(page: Page, app: App | None = None, query: str = "") -> None:
    """Open the page, or load it anew, and wait until it has arrived: before, it may undo what a test does with it."""
    if app is None:
        page.reload()
    else:
        page.goto(app.url + query)
    page.wait_for_function("window.fluxguiArrived")


def chip(page: Page) -> Locator:
    return page.locator("#run-header .chip")


def wait_until(what: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def steps_done(app: App, run: Path) -> int:
    return sum(event["kind"] == "step" for event in app.events(run))
