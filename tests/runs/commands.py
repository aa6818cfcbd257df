"""Starts the real trainer in a process of its own, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Finished:
    code: int
    output: str


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"}


def run_command(command: Sequence[str]) -> Finished:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    return Finished(done.returncode, done.stdout)


def train(*arguments: str) -> Finished:
    """`python flux_train_network.py ...`"""
    return run_command([sys.executable, "flux_train_network.py", *arguments])


def start_run_folder(folder: Path) -> subprocess.Popen[bytes]:
    """`python -m trainer run FOLDER`, as the page starts it."""
    with (folder / "worker.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", "run", str(folder)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until(is_true: Callable[[], bool], *, what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s in vain for: {what}")
        time.sleep(0.05)
