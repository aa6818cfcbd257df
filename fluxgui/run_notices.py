"""What the page notices about a run by itself: black samples, and a training that teaches nothing. No gradio."""

from __future__ import annotations

import math
import statistics
from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import Image

from fluxgui.language import say
from fluxgui.pictures import DECODE_ERRORS
from fluxgui.run_state import RunState, StepPoint

BLACK: Final = 8
"""A picture is black when no pixel is lighter than this, of 255."""
MIN_STEPS: Final = 50
STEPS_FOR_A_TREND: Final = 400
ERRORS_OF_A_RISE: Final = 4.0
"""The loss counts as rising when its end is above its beginning by so many standard errors of the two means."""


def notices(state: RunState, folder: Path) -> list[str]:
    """Warnings, the gravest first; empty when nothing is wrong as far as can be seen. `folder` is the run's."""
    found = [say("runs.black", count=number) for number in [_num_black(state, folder)] if number]
    return found + _learning(state)


def _num_black(state: RunState, folder: Path) -> int:
    """How many of the newest step's samples are black."""
    if not state.samples:
        return 0
    newest = max(sample.step for sample in state.samples)
    paths = [folder / sample.path for sample in state.samples if sample.step == newest]
    return sum(is_black(path) for path in paths)


def is_black(path: Path) -> bool:
    """Whether the picture has nothing on it; False for one that cannot be read."""
    try:
        return _is_black(path, path.stat().st_mtime_ns)
    except OSError:
        return False


@lru_cache(maxsize=4096)
def _is_black(path: Path, _modified: int) -> bool:
    try:
        with Image.open(path) as picture:
            _, lightest = picture.convert("L").getextrema()
    except DECODE_ERRORS:
        return False
    return isinstance(lightest, (int, float)) and lightest < BLACK


def _learning(state: RunState) -> list[str]:
    latest = state.points[-MIN_STEPS:]
    if len(latest) < MIN_STEPS:
        return []
    norms = [point.value for point in state.norms[-MIN_STEPS:]]
    if len(norms) == MIN_STEPS and max(norms) == 0:
        return [say("runs.no_gradient", count=MIN_STEPS)]
    rates = [point.value for point in state.rates[-MIN_STEPS:]]
    if len(rates) == MIN_STEPS and max(rates) == 0:
        return [say("runs.zero_rate", count=MIN_STEPS)]
    if len({point.value for point in latest}) == 1:
        return [say("runs.same_loss", count=MIN_STEPS, loss=f"{latest[0].value:.4g}")]
    if _rises(state.points):
        return [say("runs.rising")]
    return []


def _rises(points: tuple[StepPoint, ...]) -> bool:
    """Whether the last quarter of the losses is above the first by far more than their scatter explains."""
    if len(points) < STEPS_FOR_A_TREND:
        return False
    size = len(points) // 4
    first, last = ([point.value for point in part] for part in (points[:size], points[-size:]))
    error = math.sqrt((_variance(first) + _variance(last)) / size)
    return statistics.fmean(last) - statistics.fmean(first) > ERRORS_OF_A_RISE * error > 0


def _variance(values: list[float]) -> float:
    # That of `statistics` is exact and a hundred times slower; this is asked for at every look at a run.
    mean = statistics.fmean(values)
    return statistics.fmean((value - mean) ** 2 for value in values)
