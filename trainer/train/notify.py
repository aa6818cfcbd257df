"""Tells the user that a run has ended: a program of theirs, and an address that takes JSON. Set in the settings.

The worker does it, so that it works with the browser and the page closed. A worker that is killed tells nothing; the
page's program, where it is open, has it told by `python -m trainer notify --run=FOLDER`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Final

from trainer.schema.events import EventReader
from trainer.schema.run_folder import RunFolder
from trainer.schema.settings import TOKEN_VARIABLE, Settings, read_settings

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
        elif event.get("kind") == "step":
            found["steps"] = event.get("step", 0)
        elif event.get("kind") == "error":
            found["message"] = str(event.get("message", ""))
        elif event.get("kind") == "run_finished":
            found |= {"outcome": event.get("outcome", "failed"), "steps": event.get("steps", 0)}
    return _in_words(found)


def _in_words(found: dict[str, object]) -> dict[str, object]:
    reason = f": {found['message']}" if found["message"] else ""
    return {**found, "text": f"FluxGUI: {found['name']} {found['outcome']} after {found['steps']} steps{reason}"}


def notify_end(run: RunFolder) -> None:
    """Start the user's program and call their address, where they are set. Problems are lines in the log."""
    settings = read_settings()
    if settings.notify_command or settings.notify_webhook is not None:
        for problem in _tell(settings, run_summary(run)):
            logger.warning("at the end of the run, %s", problem)


def tell_of_crash(run: RunFolder) -> list[str]:
    """Tell that the run's worker is gone without having said so. Gives what did not work."""
    message = "the trainer ended without saying why; the end of its log may tell"
    return _tell(read_settings(), _in_words({**run_summary(run), "outcome": "crashed", "message": message}))


def try_out() -> list[str]:
    """Tell of a run that there was not, with what is set now. Gives what did not work."""
    text = "FluxGUI: this is a trial"
    summary = {
        "run": "trial",
        "name": "trial",
        "outcome": "completed",
        "steps": 0,
        "message": "",
        "folder": "",
        "text": text,
    }
    return _tell(read_settings(), summary)


def _tell(settings: Settings, summary: Mapping[str, object]) -> list[str]:
    problems = [_start(settings.notify_command, summary)] if settings.notify_command else []
    problems += [_post(settings.notify_webhook, summary)] if settings.notify_webhook is not None else []
    return [problem for problem in problems if problem is not None]


def _start(words: Sequence[str], summary: Mapping[str, object]) -> str | None:
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
        return f"the program did not work: {error}"
    return f"the program ended with code {ended.returncode}: {ended.stderr[-500:]}" if ended.returncode else None


def _post(address: str, summary: Mapping[str, object]) -> str | None:
    """`content` and `text` are what chat services look for; the rest is for programs."""
    body = json.dumps({**summary, "content": summary["text"]}).encode()
    if not address.startswith(("http://", "https://")):
        return "the webhook is no address"
    request = urllib.request.Request(
        address, data=body, headers={"Content-Type": "application/json", "User-Agent": "FluxGUI"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return None
    except (OSError, ValueError) as error:
        # The address is a key to somebody's channel, so the log does not name it.
        reason = f"code {error.code}" if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        return f"the webhook did not answer: {reason}"
