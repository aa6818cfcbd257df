"""Where a run is, how long it goes on, and the random numbers that belong to a place in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

SaveKind = Literal["step", "epoch", "moment"]
"""When a state is saved: with a step's or an epoch's LoRA, or because one is due by the clock."""


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often. Steps are optimizer steps; `num_micro_steps` is the accumulation."""

    num_steps: int
    num_epochs: int
    micro_steps_per_epoch: int
    num_micro_steps: int
    max_grad_norm: float
    seed: int
    save_every_n_steps: int | None
    save_every_n_epochs: int | None
    sample_every_n_steps: int | None
    sample_every_n_epochs: int | None
    sample_at_first: bool
    validate_every_n_steps: int | None = None
    validate_every_n_epochs: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.micro_steps_per_epoch / self.num_micro_steps)

    def position_after(self, step: int) -> StepPosition:
        """Where a run is when `step` optimizer steps are done: still in the epoch that the last one belongs to."""
        return StepPosition(step, max(1, math.ceil(step / self.steps_per_epoch)))


@dataclass(frozen=True)
class StepPosition:
    """Where the run is after a step: `step` optimizer steps done, in `epoch` (1-based)."""

    step: int
    epoch: int


def step_generator(seed: int, step: int, micro_step: int, rank: int) -> torch.Generator:
    """The host generator of one micro-step: a function of its position, so resuming needs no stored state.

    Different on every rank, unlike the reference, where all ranks draw the same noise.
    """
    mixed = (seed * 1_000_003 + step * 8_191 + micro_step * 127 + rank * 31_337 + 0x5EED) % (2**63)
    return torch.Generator().manual_seed(mixed)
