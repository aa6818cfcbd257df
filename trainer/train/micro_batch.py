"""One micro-batch of the loop, and what ends a run whose numbers are lost in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.schema.base import UserError
from trainer.train.step_position import StepPosition

MicroBatch = Callable[[torch.Generator], Tensor]
"""Gives the loss of one micro-batch; everything random comes from the generator and torch's own."""


class NumbersLost(UserError):
    """A loss or a gradient is no number. The weights are still those of `position`, the last whole step.

    `micro_batch` with `generator` is what was computed; of several micro-steps the first whose loss is no number.
    """

    def __init__(
        self, what: str, *, position: StepPosition, micro_batch: MicroBatch, generator: torch.Generator
    ) -> None:
        super().__init__(
            what, hint="Lower learning_rate, or train with mixed_precision bf16. The weights are left as they were."
        )
        self.position = position
        self.micro_batch = micro_batch
        self.generator = generator
