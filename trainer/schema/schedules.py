"""The learning-rate schedules that are known by name, and what each takes. Names are those of transformers and diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from trainer.schema.optimizers import ABOVE_ZERO, AMOUNT, COUNT_OR_ZERO, PART, Check, Settings

_RULES: Final = re.compile(r"([0-9.eE+-]+:[0-9]+,)+[0-9.eE+-]+")


def _is_rules(value: object) -> bool:
    if not isinstance(value, str) or not _RULES.fullmatch(value.replace(" ", "")):
        return False
    try:
        parse_step_rules(value)
    except ValueError:
        return False
    return True


def _one_of(*choices: str) -> Check:
    return lambda value: value in choices, f"must be one of {', '.join(choices)}"


SCHEDULES: Final[Mapping[str, Settings]] = MappingProxyType(
    {
        "constant": {},
        "constant_with_warmup": {},
        "linear": {},
        "cosine": {"num_cycles": ABOVE_ZERO},
        "cosine_with_restarts": {},
        "polynomial": {"lr_end": AMOUNT},
        "inverse_sqrt": {},
        "cosine_with_min_lr": {"min_lr": AMOUNT},
        "cosine_warmup_with_min_lr": {"min_lr": AMOUNT, "warmup_lr_rate": PART},
        "warmup_stable_decay": {
            "warmup_type": _one_of("linear", "cosine", "1-sqrt"),
            "decay_type": _one_of("linear", "cosine", "1-sqrt"),
        },
        "piecewise_constant": {"step_rules": (_is_rules, 'must be rules such as "1:100,0.1:200,0.01"')},
        "reduce_lr_on_plateau": {
            "mode": _one_of("min"),
            "factor": PART,
            "patience": COUNT_OR_ZERO,
            "threshold": AMOUNT,
            "threshold_mode": _one_of("rel", "abs"),
            "cooldown": COUNT_OR_ZERO,
            "min_lr": AMOUNT,
            "eps": AMOUNT,
        },
        "adafactor": {},
    }
)
"""Schedule -> what `lr_scheduler_args` may hold for it."""

WITHOUT_WARMUP: Final = ("constant", "reduce_lr_on_plateau")
"""Schedules that refuse a warm-up, which they could not make."""

USERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "lr_decay_steps": ("warmup_stable_decay",),
        "lr_scheduler_num_cycles": (
            "cosine_with_restarts",
            "cosine_with_min_lr",
            "cosine_warmup_with_min_lr",
            "warmup_stable_decay",
        ),
        "lr_scheduler_power": ("polynomial",),
        "lr_scheduler_timescale": ("inverse_sqrt",),
        "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
        "lr_warmup_steps": tuple(name for name in SCHEDULES if name not in ("piecewise_constant", "adafactor")),
    }
)
"""Option -> the schedules that it means something for."""


def parse_step_rules(rules: str) -> tuple[list[tuple[int, float]], float]:
    """`"1:100,0.1:200,0.01"` as ([(100, 1.0), (200, 0.1)], 0.01): a factor until each step, and the last one after it.

    The form is that of diffusers (`optimization.py`, `get_piecewise_constant_schedule`).
    """
    *pieces, last = rules.replace(" ", "").split(",")
    pairs = [(int(step), float(factor)) for factor, step in (piece.split(":") for piece in pieces)]
    if sorted(step for step, _ in pairs) != [step for step, _ in pairs]:
        raise ValueError("the steps of step_rules must rise")
    return pairs, float(last)


def num_steps_of(value: float, num_steps: int) -> int:
    """A number of steps as it was given: below 1 it is a part of the whole run."""
    return int(value * num_steps) if value < 1 else int(value)
