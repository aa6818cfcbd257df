"""What the events of a run add up to. Pure: events in, a state out, no files and no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal, cast

Outcome = Literal["completed", "stopped", "failed"]

NUM_LEVELS: Final = 4
"""Noise levels are told apart by quarters: 0-25 %, 25-50 %, 50-75 %, 75-100 % noise."""
PACE_STEPS: Final = 50
"""The time left is judged by this many of the latest steps."""


@dataclass(frozen=True)
class StepPoint:
    """A step's loss, rate or other figure; always a finite number, so that it can be drawn."""

    step: int
    value: float


@dataclass(frozen=True)
class Sample:
    """A sample picture; `path` is relative to the run folder when it lies inside."""

    step: int
    path: str
    prompt: str
    index: int
    seed: int | None


@dataclass(frozen=True)
class Checkpoint:
    """A saved LoRA; `path` is relative to the run folder when it lies inside."""

    step: int
    epoch: int
    path: str
    num_bytes: int
    is_final: bool


@dataclass(frozen=True)
class RunError:
    """What went wrong, what to do about it, and where; the last two may be empty."""

    message: str
    hint: str
    where: str


@dataclass(frozen=True)
class RunState:
    """A run as its events tell it. `num_seen` grows with every event, so an equal number means nothing new.

    `levels` are the losses of each quarter of the noise levels; a step has them for those that it drew.
    """

    num_seen: int = 0
    attempt: int = 0
    pid: int | None = None
    device: str = ""
    started_at: float | None = None
    last_event_at: float | None = None
    phase: str = ""
    phase_done: int = 0
    phase_total: int = 0
    num_images: int = 0
    num_epochs: int = 0
    num_steps: int = 0
    step: int = 0
    epoch: int = 0
    step_seconds: float | None = None
    peak_bytes: int | None = None
    host_bytes: int | None = None
    learning_rate: float | None = None
    loss: float | None = None
    is_paused: bool = False
    points: tuple[StepPoint, ...] = ()
    validation: tuple[StepPoint, ...] = ()
    rates: tuple[StepPoint, ...] = ()
    levels: tuple[tuple[StepPoint, ...], ...] = ((),) * NUM_LEVELS
    norms: tuple[StepPoint, ...] = ()
    step_times: tuple[float, ...] = ()
    samples: tuple[Sample, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    warnings: tuple[str, ...] = ()
    errors: tuple[RunError, ...] = ()
    outcome: Outcome | None = None

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the pace of the latest ones, samples and saves included; None while unknown."""
        if self.outcome is not None or self.num_steps <= self.step or len(self.step_times) < 2:
            return None
        pace = (self.step_times[-1] - self.step_times[0]) / (len(self.step_times) - 1)
        return pace * (self.num_steps - self.step)


def fold(state: RunState, events: Iterable[Mapping[str, object]]) -> RunState:
    """`state` after `events`. Kinds that are not known change nothing but the count."""
    new = _NewPoints()
    times = list(state.step_times)
    for event in events:
        kind = event.get("kind")
        if kind == "step":
            # The only kind that comes by the thousand, so it is collected and joined once below.
            new.add(event)
            times = [*times[-PACE_STEPS:], _float(event, "time") or 0.0]
        elif kind in ("run_started", "plan"):
            state, new = new.join(state), _NewPoints()
            times = []
        elif kind == "resumed":
            times = []
        state = _fold_one(state, event)
    return replace(new.join(state), step_times=tuple(times))


class _NewPoints:
    """What the steps of a look add to the curves, in lists that grow without copying what is there."""

    def __init__(self) -> None:
        self._curves: dict[str, list[StepPoint]] = {"points": [], "rates": [], "norms": []}
        self._levels: list[list[StepPoint]] = [[] for _ in range(NUM_LEVELS)]

    def add(self, event: Mapping[str, object]) -> None:
        step = _int(event, "step")
        for curve, key in (("points", "loss"), ("rates", "lr"), ("norms", "grad_norm")):
            value = _float(event, key)
            if value is not None and math.isfinite(value):
                self._curves[curve].append(StepPoint(step, value))
        levels = event.get("level_losses")
        if isinstance(levels, list) and len(cast("list[object]", levels)) == NUM_LEVELS:
            for points, loss in zip(self._levels, cast("list[object]", levels), strict=True):
                if isinstance(loss, (int, float)) and math.isfinite(loss):
                    points.append(StepPoint(step, float(loss)))

    def join(self, state: RunState) -> RunState:
        curves = self._curves
        return replace(
            state,
            points=(*state.points, *curves["points"]),
            rates=(*state.rates, *curves["rates"]),
            norms=(*state.norms, *curves["norms"]),
            levels=tuple((*old, *new) for old, new in zip(state.levels, self._levels, strict=True)),
        )


def up_to(points: tuple[StepPoint, ...], last: int) -> tuple[StepPoint, ...]:
    """The points of steps up to `last`, which is included."""
    return tuple(point for point in points if point.step <= last)


def _fold_one(state: RunState, event: Mapping[str, object]) -> RunState:
    state = replace(
        state,
        num_seen=state.num_seen + 1,
        last_event_at=_float(event, "time") or state.last_event_at,
        attempt=_int(event, "attempt") or state.attempt,
    )
    match event.get("kind"):
        case "run_started":
            return replace(
                state,
                pid=_int(event, "pid"),
                device=_text(event, "device"),
                started_at=_float(event, "time"),
                outcome=None,
                errors=(),
                warnings=(),
                is_paused=False,
            )
        case "plan":
            # A later attempt goes on behind its first step; what an earlier one did beyond that is drawn only once.
            first = _int(event, "first_step")
            return replace(
                state,
                num_images=_int(event, "num_images"),
                num_epochs=_int(event, "num_epochs"),
                num_steps=_int(event, "num_steps"),
                device=_text(event, "device") or state.device,
                step=first,
                points=up_to(state.points, first),
                validation=up_to(state.validation, first),
                rates=up_to(state.rates, first),
                norms=up_to(state.norms, first),
                levels=tuple(up_to(points, first) for points in state.levels),
            )
        case "phase":
            return replace(state, phase=_text(event, "name"), phase_done=0, phase_total=0)
        case "progress":
            return replace(
                state,
                phase=_text(event, "phase") or state.phase,
                phase_done=_int(event, "done"),
                phase_total=_int(event, "total"),
            )
        case "step":
            return replace(
                state,
                step=_int(event, "step"),
                epoch=_int(event, "epoch"),
                step_seconds=_float(event, "step_seconds"),
                peak_bytes=_int(event, "peak_bytes") or state.peak_bytes,
                host_bytes=_int(event, "host_bytes") or state.host_bytes,
                learning_rate=_float(event, "lr"),
                loss=_float(event, "loss"),
            )
        case "validation":
            loss, step = _float(event, "loss"), _int(event, "step")
            if loss is None or not math.isfinite(loss):
                return state
            # A step that ends an epoch is reported as both.
            others = tuple(point for point in state.validation if point.step != step)
            return replace(state, validation=(*others, StepPoint(step, loss)))
        case "sample":
            sample = Sample(
                step=_int(event, "step"),
                path=_text(event, "path"),
                prompt=_text(event, "prompt"),
                index=_int(event, "index"),
                seed=_int(event, "seed") if event.get("seed") is not None else None,
            )
            # A resumed run may draw the samples of its first step once more.
            others = (
                s for s in state.samples if s.path != sample.path and (s.step, s.index) != (sample.step, sample.index)
            )
            return replace(state, samples=(*others, sample))
        case "checkpoint":
            checkpoint = Checkpoint(
                step=_int(event, "step"),
                epoch=_int(event, "epoch"),
                path=_text(event, "path"),
                num_bytes=_int(event, "bytes"),
                is_final=event.get("is_final") is True,
            )
            others = (c for c in state.checkpoints if c.path != checkpoint.path)
            return replace(state, checkpoints=(*others, checkpoint))
        case "warning":
            return replace(state, warnings=(*state.warnings, _text(event, "message")))
        case "error":
            error = RunError(_text(event, "message"), _text(event, "hint"), _text(event, "where"))
            return replace(state, errors=(*state.errors, error))
        case "paused":
            return replace(state, is_paused=True)
        case "resumed":
            return replace(state, is_paused=False)
        case "run_finished":
            outcome = _text(event, "outcome")
            if outcome == "completed" or outcome == "stopped" or outcome == "failed":
                return replace(state, outcome=outcome, is_paused=False)
            return state
        case _:
            return state


def smoothed(values: Iterable[float], weight: float) -> list[float]:
    """Exponential moving average without the start's bias; `weight` 0 changes nothing, close to 1 smooths most."""
    result: list[float] = []
    total, norm = 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def thinned(points: tuple[StepPoint, ...], limit: int) -> list[StepPoint]:
    """At most `limit` points: the mean of equal stretches, at the last step of each."""
    if len(points) <= limit:
        return list(points)
    return [StepPoint(part[-1].step, statistics.fmean(p.value for p in part)) for part in _stretches(points, limit)]


def extremes(points: tuple[StepPoint, ...], limit: int) -> list[StepPoint]:
    """At most `limit` of the points: the lowest and the highest of equal stretches, so that their scatter remains."""
    if len(points) <= limit:
        return list(points)
    kept: list[StepPoint] = []
    for part in _stretches(points, limit // 2):
        ends = (min(part, key=lambda point: point.value), max(part, key=lambda point: point.value))
        kept += sorted(ends, key=lambda point: point.step)
    return kept


def _stretches(points: tuple[StepPoint, ...], number: int) -> list[tuple[StepPoint, ...]]:
    edges = [round(i * len(points) / number) for i in range(number + 1)]
    return [points[start:end] for start, end in pairwise(edges) if end > start]


def _int(event: Mapping[str, object], key: str) -> int:
    value = event.get(key)
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0


def _float(event: Mapping[str, object], key: str) -> float | None:
    value = event.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def _text(event: Mapping[str, object], key: str) -> str:
    value = event.get(key)
    return value if isinstance(value, str) else ""
