"""How many steps a run has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.schema.options import Options


@dataclass(frozen=True)
class Schedule:
    """How many steps there are. A micro-step is one batch; steps are optimizer steps."""

    micro_steps_per_epoch: int
    steps_per_epoch: int
    num_epochs: int
    num_steps: int


def epochs_between_saves(options: Options, num_epochs: int) -> int | None:
    """`save_every_n_epochs`, or what `save_n_epoch_ratio` makes of the number of epochs, by the reference's rule."""
    ratio = options.save_n_epoch_ratio
    if ratio is None or ratio <= 0:
        return options.save_every_n_epochs
    return max(1, num_epochs // ratio)


def make_schedule(options: Options, num_batches_per_epoch: int, num_processes: int) -> Schedule:
    """Epochs and steps by the reference trainer's arithmetic: epochs win over steps, a rest of an epoch's batches
    makes a smaller last accumulation."""
    micro_steps = math.ceil(num_batches_per_epoch / num_processes)
    steps_per_epoch = math.ceil(micro_steps / options.gradient_accumulation_steps)
    if options.max_train_epochs is not None:
        return Schedule(
            micro_steps, steps_per_epoch, options.max_train_epochs, options.max_train_epochs * steps_per_epoch
        )
    num_steps = options.max_train_steps
    return Schedule(micro_steps, steps_per_epoch, math.ceil(num_steps / steps_per_epoch), num_steps)
