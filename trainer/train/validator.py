"""The validation loss: the same noise at the same noise levels on the same pictures, whenever and in whichever run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final

import torch
from torch import Tensor, nn

from trainer.data.batches import BatchPlan, PlannedItem
from trainer.model.transformer import Transformer
from trainer.train import flow
from trainer.train.conditioning import TextSource
from trainer.train.latents_phase import LatentSource
from trainer.train.objective import predict_velocity
from trainer.train.reporting import Reporter, StopRequested

TIMESTEPS: Final = (0.2, 0.4, 0.6, 0.8)
"""The four that the reference trainer means (200 to 800 of 1000) and does not use."""


class Validator:
    """Gives the mean squared error of the model's velocity over all validation pictures and `TIMESTEPS`.

    Of pictures with a mask only what the mask shows counts.

    It depends on the pictures, the captions, the weights and `guidance_scale` alone: not on the run's seed, its
    timestep sampling, loss, weights of losses or dropouts, nor on batches and processes. So runs can be compared.
    Call it with the weights that are to be measured; the network is left in evaluation mode.
    """

    def __init__(
        self,
        plans: Sequence[BatchPlan],
        *,
        seed: int,
        latents: LatentSource,
        text: TextSource,
        model: Transformer,
        network: nn.Module,
        guidance_scale: float,
        autocast: Callable[[], AbstractContextManager[object]],
        compute_dtype: torch.dtype,
        device: torch.device,
        reporter: Reporter,
        rank: int = 0,
        num_processes: int = 1,
        reduce_mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._plans = plans[rank::num_processes]
        self._seed = seed
        self._latents = latents
        self._text = text
        self._model = model
        self._network = network
        self._guidance_scale = guidance_scale
        self._autocast = autocast
        self._compute_dtype = compute_dtype
        self._device = device
        self._reporter = reporter
        self._num_processes = num_processes
        self._reduce_mean = reduce_mean

    def __call__(self) -> float:
        self._reporter.phase("validation")
        self._network.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for done, plan in enumerate(self._plans):
                errors = self._errors(plan)
                total += float(errors.sum())
                count += errors.numel()
                # On several devices all of them have to come to the sum below; a stop waits that long.
                with contextlib.nullcontext() if self._num_processes == 1 else contextlib.suppress(StopRequested):
                    self._reporter.progress(done + 1, len(self._plans))
        sums = self._reduce_mean(torch.tensor([total, float(count)], dtype=torch.float32, device=self._device))
        return float(sums[0] / sums[1])

    def _errors(self, plan: BatchPlan) -> Tensor:
        """The errors of a batch, (timesteps, B) float32 on the host."""
        latents = torch.cat([self._latents_of(planned, plan) for planned in plan.items])
        mask = self._latents.masks.load(plan)
        # Where a mask leaves nothing, everything counts after all.
        weights = torch.ones_like(latents[:, :1]) if mask is None else mask.to(self._device).float()
        weights = torch.where(weights.sum(dim=(1, 2, 3), keepdim=True) > 0, weights, torch.ones_like(weights))
        text = self._text([planned.caption for planned in plan.items])
        errors: list[Tensor] = []
        for timestep in TIMESTEPS:
            noise = torch.cat([self._noise(planned, timestep, latents[:1].shape) for planned in plan.items])
            noise = noise.to(self._device)
            sigmas = torch.full((latents.shape[0],), timestep, device=self._device)
            noisy = (1 - timestep) * latents + timestep * noise
            with self._autocast():
                velocity = predict_velocity(
                    self._model, noisy.to(self._compute_dtype), sigmas, text, self._guidance_scale
                ).float()
            squared = (velocity - flow.velocity_target(latents, noise)).square().mean(dim=1, keepdim=True)
            # A mean over what counts, so that small masks weigh as much as large ones.
            errors.append(((squared * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))).cpu())
        return torch.stack(errors)

    def _latents_of(self, planned: PlannedItem, plan: BatchPlan) -> Tensor:
        """Latents (1, 16, h, w) of one item: where the autoencoder's draw is made now, it too is always the same."""
        single = BatchPlan((planned,), plan.size)
        return self._latents.finish(self._latents.load(single), self._generator(planned, "latents"))

    def _noise(self, planned: PlannedItem, timestep: float, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator(planned, f"noise {timestep}"))

    def _generator(self, planned: PlannedItem, purpose: str) -> torch.Generator:
        width, height = planned.item.bucket
        words = f"{purpose} {self._seed} {planned.item.digest} {width} {height}"
        return torch.Generator().manual_seed(int(hashlib.sha256(words.encode()).hexdigest()[:15], 16))
