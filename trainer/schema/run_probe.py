"""How a run is: its lock, its heartbeat and what its events add up to, put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from trainer.schema.events import read_last_event
from trainer.schema.run_folder import RunFolder, read_json
from trainer.schema.run_liveness import is_locked
from trainer.schema.run_queue import is_wanted, is_withdrawn

FROZEN_SECONDS: Final = 60.0
"""A heartbeat older than this, with the lock still held, comes from a process that does not get to run."""

STUCK_SECONDS: Final[Mapping[str, float]] = {
    "check": 120.0,
    "text": 240.0,
    "latents": 240.0,
    "model": 900.0,
    "training": 600.0,
    "sampling": 600.0,
    "saving": 300.0,
}
"""How long each phase may go without progress. `model` is 24 GB from a disk that may be slow; a phase that is not
listed, such as waiting for the device, may take any time."""
SLOW_STEPS: Final = 10
"""Training may also go without progress for as long as this many of its steps take."""

_PHASE_WORDS: Final[Mapping[str, str]] = {
    "check": "checking files and pictures",
    "waiting": "waiting for another run to finish",
    "text": "caching captions",
    "latents": "caching pictures",
    "model": "loading the model",
    "training": "training",
    "sampling": "making samples",
    "saving": "saving",
}

State = Literal["starting", "running", "paused", "stuck", "completed", "stopped", "failed", "queued", "crashed"]


class RunFacts(Protocol):
    """What `probe` needs of the state that a run's events add up to. `num_seen` is the number of events."""

    @property
    def num_seen(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def is_paused(self) -> bool: ...
    @property
    def step_seconds(self) -> float | None: ...
    @property
    def outcome(self) -> Literal["completed", "stopped", "failed"] | None: ...


@dataclass(frozen=True)
class RunStatus:
    """How a run is. `detail` is a sentence for a person, empty where the state says it all."""

    state: State
    detail: str = ""


def probe(run: RunFolder, facts: RunFacts, clock: Callable[[], float] = time.time) -> RunStatus:
    """How the run is now: `facts` say how far it came, the lock and the heartbeat whether somebody goes on with it."""
    if is_locked(run):
        return _status_alive(run, facts, clock())
    if is_wanted(run):
        return RunStatus("queued", "Waits for its turn.")
    outcome = facts.outcome or _outcome_written_since(run)
    if outcome is not None:
        return RunStatus(outcome)
    if facts.num_seen == 0 and not run.heartbeat_json.exists():
        return RunStatus(
            "stopped", "It was taken out of the queue." if is_withdrawn(run) else "It was not asked to start."
        )
    phase = _PHASE_WORDS.get(facts.phase, facts.phase) or "starting"
    return RunStatus("crashed", f"The trainer ended without a word while {phase}.")


def _status_alive(run: RunFolder, facts: RunFacts, now: float) -> RunStatus:
    beat = read_json(run.heartbeat_json)
    phase = str(beat.get("phase") or facts.phase)
    words = _PHASE_WORDS.get(phase, phase) or "starting"
    written, progressed = _seconds_since(now, beat.get("time")), _seconds_since(now, beat.get("progress_time"))
    if written is not None and written > FROZEN_SECONDS:
        return RunStatus("stuck", f"The trainer has not moved for {_duration(written)} while {words}.")
    if facts.is_paused:
        return RunStatus("paused")
    limit = STUCK_SECONDS.get(phase)
    if limit is not None and phase == "training":
        limit = max(limit, SLOW_STEPS * (facts.step_seconds or 0.0))
    if limit is not None and progressed is not None and progressed > limit:
        return RunStatus("stuck", f"No progress for {_duration(progressed)} while {words}.")
    return RunStatus("running")


def _outcome_written_since(run: RunFolder) -> Literal["completed", "stopped", "failed"] | None:
    """The outcome of a worker that ended between the reading of the facts and the look at its lock."""
    last = read_last_event(run.events_jsonl) or {}
    if last.get("kind") != "run_finished":
        return None
    outcomes: tuple[Literal["completed", "stopped", "failed"], ...] = ("completed", "stopped", "failed")
    return next((outcome for outcome in outcomes if outcome == last.get("outcome")), None)


def _seconds_since(now: float, moment: object) -> float | None:
    return max(0.0, now - moment) if isinstance(moment, (int, float)) else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
