"""One micro-step's loss: latents, noise, the model's velocity, the loss. Composed from the pure parts in `flow`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.model.chroma import Chroma
from trainer.model.packing import image_ids, pack_latents, text_ids, unpack_latents
from trainer.model.transformer import Transformer
from trainer.train import flow
from trainer.train.conditioning import TextInputs, TextSource


def predict_velocity(
    model: Transformer, noisy: Tensor, timesteps: Tensor, text: TextInputs, guidance_scale: float | Tensor
) -> Tensor:
    """The model's velocity for `noisy` (B, 16, h, w) at `timesteps` (B,) in [0, 1]; same shape as `noisy`.

    `guidance_scale` is one number or one for each picture, (B,).
    """
    batch, _, height, width = noisy.shape
    guidance = torch.as_tensor(guidance_scale, device=noisy.device, dtype=torch.float32).expand(batch)
    inputs = {
        "img": pack_latents(noisy),
        "img_ids": image_ids(height // 2, width // 2, noisy.device).expand(batch, -1, -1),
        "txt": text.txt,
        "txt_ids": text_ids(text.txt.shape[1], noisy.device).expand(batch, -1, -1),
        "timesteps": timesteps,
        "txt_attention_mask": text.mask,
    }
    if isinstance(model, Chroma):
        packed = model(**inputs, guidance=guidance)
    else:
        packed = model(**inputs, y=text.vec, guidance=guidance if model.params.guidance_embed else None)
    return unpack_latents(packed, height, width)


@dataclass(frozen=True)
class FlowSettings:
    """How noise, timestep, target and loss are formed; names and defaults are the reference trainer's."""

    timestep_sampling: str
    sigmoid_scale: float
    discrete_flow_shift: float
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    model_prediction_type: str
    guidance_scale: float
    loss_type: str
    huber_schedule: str
    huber_c: float
    huber_scale: float
    ip_noise_gamma: float | None
    ip_noise_gamma_random_strength: bool
    min_timestep: int | None = None
    max_timestep: int | None = None
    rounds_timesteps: bool = False
    divides_by_mask: bool = False


@dataclass(frozen=True)
class FlowBatch:
    """One batch with everything random drawn, on the device.

    `latents`, `noise`, `noisy` (B, 16, h, w) float32; `sigmas` (B,) mix the noise, `timesteps` (B,) in [0, 1] go to the
    model and the huber schedule: the same numbers unless they are rounded as in the reference; `loss_weights` (B,).
    `mask` (B, 1, h, w) in [0, 1] or None; `preserved` (B,) bool says which samples have the prediction without the
    network as their target, None for none. `host_timesteps` (B,) are the timesteps before they went to the device.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    timesteps: Tensor
    noisy: Tensor
    text: TextInputs
    loss_weights: Tensor
    mask: Tensor | None = None
    preserved: Tensor | None = None
    host_timesteps: Tensor | None = None

    def rows(self, chosen: Tensor) -> FlowBatch:
        """The samples whose numbers are in `chosen` (N,), in that order."""
        text = self.text
        return FlowBatch(
            self.latents[chosen],
            self.noise[chosen],
            self.sigmas[chosen],
            self.timesteps[chosen],
            self.noisy[chosen],
            TextInputs(text.txt[chosen], text.vec[chosen], None if text.mask is None else text.mask[chosen]),
            self.loss_weights[chosen],
        )


@dataclass(frozen=True)
class Comparison:
    """What the loss is made of: the prediction after the prediction-type map and the target (B, 16, h, w), and the
    loss weights (B, 1, 1, 1) that belong to the prediction type, None for 1."""

    prediction: Tensor
    target: Tensor
    weighting: Tensor | None


class FlowObjective:
    """Computes the loss of one batch. Holds the model and where text comes from; no optimizer, no schedule."""

    def __init__(
        self,
        model: Transformer,
        text: TextSource,
        settings: FlowSettings,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        compute_dtype: torch.dtype,
        device: torch.device,
        without_network: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`without_network` turns the trained network off while it is entered."""
        self._model = model
        self._text = text
        self._settings = settings
        self._autocast = autocast
        self._compute_dtype = compute_dtype
        self._device = device
        self._without_network = without_network

    def __call__(
        self, latents: Tensor, captions: Sequence[str], loss_weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Mean loss of the batch; see `draw` for the arguments."""
        return self.loss(self.draw(latents, captions, loss_weights, generator))

    def draw(
        self,
        latents: Tensor,
        captions: Sequence[str],
        loss_weights: Tensor,
        generator: torch.Generator,
        *,
        mask: Tensor | None = None,
        preserved: Tensor | None = None,
    ) -> FlowBatch:
        """The batch with its text, noise and timesteps.

        `latents` (B, 16, h, w) float32 on the device, `loss_weights` (B,); `mask` and `preserved` as in `FlowBatch`,
        which they become part of. `generator` is a host generator: noise is
        drawn there in float32, so the same seed trains the same on every device. (The reference draws in the AE's
        dtype when latents are not cached on disk, which makes the same settings train differently.)
        """
        settings = self._settings
        text = self._text(captions)
        noise = torch.randn(latents.shape, generator=generator).to(self._device)
        sigmas = flow.sample_sigmas(
            settings.timestep_sampling,
            latents.shape[0],
            latent_height=latents.shape[2],
            latent_width=latents.shape[3],
            sigmoid_scale=settings.sigmoid_scale,
            discrete_flow_shift=settings.discrete_flow_shift,
            weighting_scheme=settings.weighting_scheme,
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            mode_scale=settings.mode_scale,
            generator=generator,
        )
        sigmas = flow.limit_sigmas(sigmas, settings.min_timestep, settings.max_timestep)
        host_timesteps = sigmas
        timesteps = sigmas.to(self._device)
        if settings.rounds_timesteps and settings.timestep_sampling == "sigma":
            # The reference looks the level up in a table of the training's format, and mixes with it.
            sigmas = sigmas.to(self._compute_dtype).float()
        batch = self.mix(
            latents, noise, sigmas.to(self._device), text, loss_weights, generator, exact_timesteps=timesteps
        )
        return replace(batch, mask=mask, preserved=preserved, host_timesteps=host_timesteps)

    def mix(
        self,
        latents: Tensor,
        noise: Tensor,
        sigmas: Tensor,
        text: TextInputs,
        loss_weights: Tensor,
        generator: torch.Generator,
        *,
        exact_timesteps: Tensor | None = None,
    ) -> FlowBatch:
        """The batch whose noise and levels `sigmas` (B,) are known; the generator serves input perturbation alone.

        `exact_timesteps` (B,) in [0, 1], not yet rounded, are given where the sigmas are no longer the same.
        """
        settings = self._settings
        noisy = flow.add_noise(
            latents,
            noise,
            sigmas,
            ip_noise_gamma=settings.ip_noise_gamma,
            ip_noise_gamma_random_strength=settings.ip_noise_gamma_random_strength,
            generator=generator,
        )
        timesteps = sigmas if exact_timesteps is None else exact_timesteps
        if settings.rounds_timesteps:
            timesteps = flow.rounded_timesteps(timesteps, self._compute_dtype)
        return FlowBatch(latents, noise, sigmas, timesteps, noisy, text, loss_weights)

    def loss(self, batch: FlowBatch) -> Tensor:
        """The loss when everything random is drawn."""
        return self.error(batch, self.compare(batch))

    def sample_losses(self, batch: FlowBatch) -> Tensor:
        """The losses of the samples, (B,), whose mean is `loss`."""
        return self._errors(batch, self.compare(batch))

    def compare(self, batch: FlowBatch) -> Comparison:
        """Runs the model; where samples are preserved, first without the network on these."""
        target = flow.velocity_target(batch.latents, batch.noise)
        if batch.preserved is not None and bool(batch.preserved.any()):
            chosen = batch.preserved.nonzero()[:, 0]
            with torch.no_grad(), self._without_network():
                # As in the reference, the captions stay encoded with the network.
                target = target.index_copy(0, chosen, self._predict(batch.rows(chosen))[0])
        prediction, weighting = self._predict(batch)
        return Comparison(prediction, target, weighting)

    def _predict(self, batch: FlowBatch) -> tuple[Tensor, Tensor | None]:
        """What is compared with the target, and its weights."""
        settings = self._settings
        with self._autocast():
            velocity = predict_velocity(
                self._model,
                batch.noisy.to(self._compute_dtype),
                batch.timesteps,
                batch.text,
                settings.guidance_scale,
            ).float()
        return flow.apply_prediction_type(
            settings.model_prediction_type, velocity, batch.noisy, batch.sigmas, settings.weighting_scheme
        )

    def error(self, batch: FlowBatch, comparison: Comparison) -> Tensor:
        """The loss of what was compared, a scalar."""
        return self._errors(batch, comparison).mean()

    def _errors(self, batch: FlowBatch, comparison: Comparison) -> Tensor:
        settings = self._settings
        return flow.sample_losses(
            comparison.prediction,
            comparison.target,
            batch.timesteps,
            loss_type=settings.loss_type,
            huber_schedule=settings.huber_schedule,
            huber_c=settings.huber_c,
            huber_scale=settings.huber_scale,
            weighting=comparison.weighting,
            loss_weights=batch.loss_weights,
            mask=batch.mask,
            divides_by_mask=settings.divides_by_mask,
        )
