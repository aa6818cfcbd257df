"""Tells the user that a run has ended: a program of theirs, and an address that takes JSON. Set in the settings.

The worker does it, so that it works with the browser and the page closed. A worker that is killed tells nothing.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import urllib.error
import urllib.request
from typing import Final

from trainer.schema.events import EventReader
from trainer.schema.run_folder import RunFolder
from trainer.schema.settings import TOKEN_VARIABLE, read_settings

logger = logging.getLogger("trainer")

SECONDS: Final = 20.0


def run_summary(run: RunFolder) -> dict[str, object]:
    """What became of a run: `run`, `name`, `outcome`, `steps`, `message` (of an error), `folder`, and `text` in words."""
    info = run.read_info()
    found: dict[str, object] = {
        "run": run.path.name,
        "name": info.get("name") or run.path.name,
        "outcome": "failed",
        "steps": 0,
        "message": "",
        "folder": str(run.path),
    }
    for event in EventReader(run.events_jsonl).read_new():
        if event.get("kind") == "run_started":
            found |= {"outcome": "failed", "message": ""}
        elif event.get("kind") == "error":
            found["message"] = str(event.get("message", ""))
        elif event.get("kind") == "run_finished":
            found |= {"outcome": event.get("outcome", "failed"), "steps": event.get("steps", 0)}
    reason = f": {found['message']}" if found["message"] else ""
    found["text"] = f"FluxGUI: {found['name']} {found['outcome']} after {found['steps']} steps{reason}"
    return found


def notify_end(run: RunFolder) -> None:
    """Start the user's program and call their address, where they are set. Problems are lines in the log."""
    settings = read_settings()
    if not settings.notify_command and settings.notify_webhook is None:
        return
    summary = run_summary(run)
    if settings.notify_command:
        _start(settings.notify_command, summary)
    if settings.notify_webhook is not None:
        _post(settings.notify_webhook, summary)


def _start(words: tuple[str, ...], summary: dict[str, object]) -> None:
    """The words are started as they are, never through a shell; what happened stands in FLUXGUI_... variables."""
    told = {f"FLUXGUI_{name.upper()}": str(value) for name, value in summary.items()}
    inherited = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    try:
        ended = subprocess.run(
            words,
            env={**inherited, **told},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        logger.warning("the program for the end of a run did not work: %s", error)
        return
    if ended.returncode:
        logger.warning("the program for the end of a run ended with code %d: %s", ended.returncode, ended.stderr[-500:])


def _post(address: str, summary: dict[str, object]) -> None:
    """`content` and `text` are what chat services look for; the rest is for programs."""
    body = json.dumps({**summary, "content": summary["text"]}).encode()
    if not address.startswith(("http://", "https://")):
        logger.warning("the webhook for the end of a run is no address")
        return
    request = urllib.request.Request(
        address, data=body, headers={"Content-Type": "application/json", "User-Agent": "FluxGUI"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return
    except (OSError, ValueError) as error:
        # The address is a key to somebody's channel, so the log does not name it.
        reason = f"code {error.code}" if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        logger.warning("the webhook for the end of a run did not answer: %s", reason)
