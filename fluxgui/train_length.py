"""How long to train, as one of three answers: the number of epochs follows from the pictures. No gradio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

FACTORS: Final[Mapping[str, float]] = {"short": 0.5, "normal": 1.0, "long": 2.0}
LENGTHS: Final = tuple(FACTORS)
VIEWS_PER_PICTURE: Final = 100
"""How often each picture is seen in a run of normal length, as the built-in presets for few pictures have it."""
MIN_VIEWS, MAX_VIEWS = 1000, 3000
"""Bounds of a run of normal length: fewer teach little, and of many pictures each needs to be seen less often."""
NUM_CHECKPOINTS, NUM_SAMPLES = 5, 10

TOTALS: Final = ("max_train_epochs", "max_train_steps")
_INTERVALS: Final = ("save_every_n_epochs", "save_every_n_steps", "sample_every_n_epochs", "sample_every_n_steps")
NAMES: Final = (*TOTALS, *_INTERVALS)
"""The fields that a length fills in."""


def length_values(
    length: str, *, num_pictures: int, num_draws: int, num_repeats: int, batch_size: int
) -> dict[str, str]:
    """What a run of this length has in the form: whole epochs, or steps where the run is shorter than one epoch.

    `num_draws` counts each picture as often as its own repeats say. Both totals are given where steps count;
    `max_train_steps` is left alone where epochs do, as they win.
    """
    views = FACTORS[length] * min(max(VIEWS_PER_PICTURE * num_pictures, MIN_VIEWS), MAX_VIEWS)
    epochs = round(views / (num_draws * num_repeats))
    if epochs:
        by_epochs = {
            "max_train_epochs": epochs,
            "save_every_n_epochs": -(-epochs // NUM_CHECKPOINTS),
            "sample_every_n_epochs": -(-epochs // NUM_SAMPLES),
        }
        return {name: str(by_epochs.get(name, "")) for name in NAMES if name != "max_train_steps"}
    steps = max(round(views / batch_size), 1)
    by_steps = {
        "max_train_steps": steps,
        "save_every_n_steps": -(-steps // NUM_CHECKPOINTS),
        "sample_every_n_steps": -(-steps // NUM_SAMPLES),
    }
    return {name: str(by_steps.get(name, "")) for name in NAMES}


def follow(
    length: object,
    values: Mapping[str, object],
    filled: Mapping[str, object] | None,
    *,
    num_pictures: int,
    num_draws: int,
) -> tuple[str | None, dict[str, object], dict[str, object]]:
    """What the form's length becomes: the answer, what it has filled in, and what it fills in now.

    `filled` is what it filled in before, None for nothing yet. The answer is None once the totals were changed by hand; an
    interval that was changed by hand stays as it is.
    """
    if length not in FACTORS:
        return None, {}, {}
    before = dict(filled) if filled is not None else {name: values[name] for name in NAMES}
    if any(values[name] != before.get(name) for name in TOTALS):
        return None, {}, {}
    if not num_pictures:
        return str(length), before, {}
    wanted = length_values(
        str(length),
        num_pictures=num_pictures,
        num_draws=num_draws,
        num_repeats=_count(values["num_repeats"]),
        batch_size=_count(values["train_batch_size"]) * _count(values["gradient_accumulation_steps"]),
    )
    kept = [name for name in wanted if values[name] == before.get(name)]
    return (
        str(length),
        {**before, **{name: wanted[name] for name in kept}},
        {name: wanted[name] for name in kept if values[name] != wanted[name]},
    )


def _count(value: object) -> int:
    return max(int(value), 1) if isinstance(value, str) and value.strip().isdecimal() else 1
