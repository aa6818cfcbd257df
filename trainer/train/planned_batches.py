"""The batches of an epoch, each of which gives its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer.data.batches import BatchPlan, epoch_batches, share_of_rank
from trainer.lora.lycoris import AnyNetwork
from trainer.model.transformer import Transformer
from trainer.schema.options import Options
from trainer.train.check import CheckedRun
from trainer.train.conditioning import TextSource
from trainer.train.engine import Engine
from trainer.train.latents_phase import LatentSource, LoadedBatch, loaded_batches
from trainer.train.level_losses import LevelLosses
from trainer.train.micro_batch import MicroBatch
from trainer.train.network_setup import network_off
from trainer.train.objective import FlowBatch, FlowObjective, FlowSettings
from trainer.train.same_named import same_named
from trainer.train.text_plan import caption_course


def flow_objective(
    options: Options, model: Transformer, network: AnyNetwork, text: TextSource, engine: Engine
) -> FlowObjective:
    return FlowObjective(
        model,
        text,
        FlowSettings(
            **same_named(FlowSettings, options),
            rounds_timesteps=options.round_timesteps,
            divides_by_mask=options.masked_loss_normalize,
        ),
        autocast=engine.autocast,
        compute_dtype=engine.dtype,
        device=engine.device,
        without_network=partial(network_off, network),
    )


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of the data: gives its loss, and can be drawn again with the same generator."""

    plan: BatchPlan
    loaded: LoadedBatch
    latents: LatentSource
    objective: FlowObjective
    level_losses: LevelLosses
    device: torch.device

    def __call__(self, generator: torch.Generator) -> Tensor:
        batch = self.draw(generator)
        losses = self.objective.sample_losses(batch)
        if batch.host_timesteps is not None:
            self.level_losses.note(batch.host_timesteps, losses)
        return losses.mean()

    def draw(self, generator: torch.Generator) -> FlowBatch:
        items, mask = self.plan.items, self.loaded.mask
        preserved = torch.tensor([planned.is_preserved for planned in items], device=self.device)
        return self.objective.draw(
            self.latents.finish(self.loaded.pixels, generator),
            [planned.caption for planned in items],
            torch.tensor([planned.loss_weight for planned in items], device=self.device),
            generator,
            mask=None if mask is None else mask.to(self.device),
            preserved=preserved if any(planned.is_preserved for planned in items) else None,
        )


def epoch_micro_batches(
    checked: CheckedRun,
    latents: LatentSource,
    objective: FlowObjective,
    level_losses: LevelLosses,
    engine: Engine,
    seed: int,
) -> Callable[[int, int], Iterator[MicroBatch]]:
    """For an epoch, one callable for each batch of this process behind the skipped ones, which gives the batch's loss."""

    options = checked.options
    course = caption_course(options, checked.schedule, engine.num_processes)
    num_threads = options.max_data_loader_n_workers

    def micro_batches(epoch: int, skipped: int) -> Iterator[MicroBatch]:
        plans = epoch_batches(checked.index, seed, epoch, prior_loss_weight=options.prior_loss_weight, course=course)
        # What comes before the place where the run goes on is not even loaded.
        share = share_of_rank(plans, engine.rank, engine.num_processes)[skipped:]
        with contextlib.closing(loaded_batches(latents, share, num_threads=num_threads)) as batches:
            for plan, loaded in batches:
                yield PlannedBatch(plan, loaded, latents, objective, level_losses, engine.device)

    return micro_batches
