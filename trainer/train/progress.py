"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Duty = Literal["step save", "step validation", "step sample", "epoch validation", "epoch save", "epoch sample"]


DUTIES: Final[tuple[Duty, ...]] = (
    "step save",
    "step validation",
    "step sample",
    "epoch validation",
    "epoch save",
    "epoch sample",
)
"""What may fall due after a step, in this order; the last three after the last step of an epoch only."""


@dataclass(frozen=True)
class Progress:
    """How far the loop has come, and what it must remember to go on exactly as if it had never been interrupted.

    `num_duties_done` of `DUTIES` are done after the step; `losses` and `loss_sum` are those of the mean loss.
    """

    step: int = 0
    num_duties_done: int = len(DUTIES)
    losses: tuple[float, ...] = ()
    loss_sum: float = 0.0
    num_skipped_in_a_row: int = 0
