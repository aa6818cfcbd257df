"""The losses of a step by noise level. FLUX's loss depends far more on the level than on what was learned, so the mean
over random levels hides what the loss at one of them shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

NUM_LEVELS: Final = 4
"""Quarters of the timesteps in [0, 1]."""


class LevelLosses:
    """Collects what the micro-steps of one step drew, and reads it together with the step's loss.

    That read is the one that a step does anyway: the device is waited for once, whatever was collected.
    """

    def __init__(self) -> None:
        self._timesteps: list[Tensor] = []
        self._losses: list[Tensor] = []

    def note(self, timesteps: Tensor, losses: Tensor) -> None:
        """Samples of a micro-step: `timesteps` (B,) in [0, 1] on the host, their `losses` (B,) on the device."""
        self._timesteps.append(timesteps)
        self._losses.append(losses.detach())

    def clear(self) -> None:
        """Forget what was noted: the step is computed anew."""
        self._timesteps.clear()
        self._losses.clear()

    def read(self, loss: Tensor) -> tuple[float, list[float | None] | None]:
        """The number in `loss`, and the mean loss of each quarter of the levels, None for those that were not drawn.

        Without anything noted the second is None. What was noted is forgotten.
        """
        if not self._losses:
            return loss.item(), None
        value, *losses = torch.cat([loss.reshape(1), *(each.to(loss.dtype) for each in self._losses)]).tolist()
        levels = mean_by_level(torch.cat(self._timesteps).tolist(), losses)
        self.clear()
        return value, levels


def mean_by_level(timesteps: Sequence[float], losses: Sequence[float]) -> list[float | None]:
    """The mean of the finite losses in each quarter; the last one holds timestep 1."""
    found: list[list[float]] = [[] for _ in range(NUM_LEVELS)]
    for timestep, loss in zip(timesteps, losses, strict=True):
        if math.isfinite(loss):
            found[min(int(timestep * NUM_LEVELS), NUM_LEVELS - 1)].append(loss)
    return [statistics.fmean(values) if values else None for values in found]
