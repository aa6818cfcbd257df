"""The mathematics of rectified flow as FLUX.1 is trained with it: noise levels, noisy latents, target, loss.

Pure functions of tensors; parity with the reference trainer (kohya-ss/sd-scripts, `library/flux_train_utils.py` and
`library/train_util.py`) is proven here, number by number. Options keep the reference's names.

B batch, C latent channels, h w latent size. A sigma is the noise level and, for FLUX, also the timestep in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_TABLE_TIMESTEPS = 1000
"""Entries of the discrete table behind `timestep_sampling=sigma`."""

_SMALLEST_AREA = 1e-6

MU_SHORT = (256, 0.5)
MU_LONG = (4096, 1.15)
"""Image tokens and mu: the two points that mu is linear through (black-forest-labs/flux, `sampling.py`)."""


def mu_for_tokens(num_tokens: int) -> float:
    """The resolution-dependent exponent of the schedule's shift. Not limited to the range between the two points."""
    (short, mu_short), (long, mu_long) = MU_SHORT, MU_LONG
    slope = (mu_long - mu_short) / (long - short)
    return mu_short + slope * (num_tokens - short)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Moves noise levels towards 1 for a shift above 1: a s / (1 + (a - 1) s). 0 and 1 stay where they are."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    timestep_sampling: str,
    batch_size: int,
    *,
    latent_height: int,
    latent_width: int,
    sigmoid_scale: float,
    discrete_flow_shift: float,
    weighting_scheme: str,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
    generator: torch.Generator,
) -> Tensor:
    """One noise level for each sample: (B,) float32 on the host, from one draw of B numbers.

    `sigmoid_scale` belongs to sigmoid, shift and flux_shift, `discrete_flow_shift` to shift and sigma, the weighting
    scheme and what follows it to sigma only. The latent size decides flux_shift.
    """
    if timestep_sampling == "uniform":
        return torch.rand(batch_size, generator=generator)
    if timestep_sampling == "sigma":
        density = _sample_density(weighting_scheme, batch_size, logit_mean, logit_std, mode_scale, generator)
        table = shift_sigmas(_descending_levels(), discrete_flow_shift)
        # The mode draw reaches 1, one past the table's end, where the reference fails.
        indices = (density * NUM_TABLE_TIMESTEPS).long().clamp(0, NUM_TABLE_TIMESTEPS - 1)
        return table[indices]
    sigmas = torch.sigmoid(sigmoid_scale * torch.randn(batch_size, generator=generator))
    if timestep_sampling == "sigmoid":
        return sigmas
    if timestep_sampling == "shift":
        return shift_sigmas(sigmas, discrete_flow_shift)
    if timestep_sampling == "flux_shift":
        num_tokens = (latent_height // 2) * (latent_width // 2)
        return shift_sigmas(sigmas, math.exp(mu_for_tokens(num_tokens)))
    raise ValueError(f"{timestep_sampling} is not a timestep sampling")


def _descending_levels() -> Tensor:
    return torch.arange(NUM_TABLE_TIMESTEPS, 0, -1, dtype=torch.float32) / NUM_TABLE_TIMESTEPS


def _sample_density(
    scheme: str, batch_size: int, logit_mean: float, logit_std: float, mode_scale: float, generator: torch.Generator
) -> Tensor:
    """Places in the table, 0 the noisiest end; (B,) about [0, 1]."""
    if scheme == "logit_normal":
        return torch.sigmoid(torch.normal(logit_mean, logit_std, (batch_size,), generator=generator))
    draw = torch.rand(batch_size, generator=generator)
    if scheme == "mode":
        return 1 - draw - mode_scale * (torch.cos(math.pi * draw / 2) ** 2 - 1 + draw)
    return draw


def limit_sigmas(sigmas: Tensor, min_timestep: int | None, max_timestep: int | None) -> Tensor:
    """Noise levels in [0, 1] squeezed into the range of the two timesteps, which count to 1000; None is no limit.

    The draw keeps its form over the shorter range, whatever the sampling. (The reference takes the two options and
    leaves FLUX's timesteps as they are.)
    """
    low, high = (min_timestep or 0) / 1000, (1000 if max_timestep is None else max_timestep) / 1000
    return sigmas if (low, high) == (0.0, 1.0) else low + (high - low) * sigmas


def rounded_timesteps(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """Timesteps (B,) in [0, 1], float32, as the reference hands them to the model when it trains in `dtype`.

    There 1000 sigma is rounded, divided by 1000 and multiplied by 1000 again in the same format; in bf16 only every
    fourth timestep above 512 is left.
    """
    return (((1000 * sigmas).to(dtype) / 1000) * 1000).float() / 1000


def add_noise(
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    *,
    ip_noise_gamma: float | None,
    ip_noise_gamma_random_strength: bool,
    generator: torch.Generator,
) -> Tensor:
    """The model's input: (1 - sigma) latents + sigma noise, all (B, C, h, w), sigmas (B,).

    `ip_noise_gamma` perturbs the noise of the input, but not the target, by so much more noise (Ning et al., 2023,
    arXiv:2301.11706); with random strength by a part of it that is drawn once for the batch.
    """
    level = _per_sample(sigmas)
    if ip_noise_gamma:
        perturbation = torch.randn(latents.shape, generator=generator).to(noise)
        strength = ip_noise_gamma
        if ip_noise_gamma_random_strength:
            strength *= torch.rand(1, generator=generator).item()
        noise = noise + strength * perturbation
    return (1 - level) * latents + level * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict: noise - latents, (B, C, h, w)."""
    return noise - latents


def apply_prediction_type(
    model_prediction_type: str, velocity: Tensor, noisy: Tensor, sigmas: Tensor, weighting_scheme: str
) -> tuple[Tensor, Tensor | None]:
    """The prediction that is compared with the target, (B, C, h, w), and loss weights (B, 1, 1, 1) or None.

    Only `raw` regresses the velocity onto the velocity target. The other two are the reference's: its target stays
    noise - latents whatever the prediction is turned into. Weights exist for sigma_scaled only.
    """
    if model_prediction_type == "raw":
        return velocity, None
    if model_prediction_type == "additive":
        return velocity + noisy, None
    if model_prediction_type != "sigma_scaled":
        raise ValueError(f"{model_prediction_type} is not a prediction type")
    level = _per_sample(sigmas)
    return noisy - level * velocity, loss_weighting(weighting_scheme, level)


def loss_weighting(weighting_scheme: str, sigmas: Tensor) -> Tensor:
    """Weight of the loss at each noise level (Esser et al., 2024, arXiv:2403.03206); 1 for schemes of sampling only."""
    if weighting_scheme == "sigma_sqrt":
        return sigmas**-2
    if weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    *,
    loss_type: str,
    huber_schedule: str,
    huber_c: float,
    huber_scale: float,
    weighting: Tensor | None,
    loss_weights: Tensor,
    mask: Tensor | None = None,
    divides_by_mask: bool = False,
) -> Tensor:
    """The losses of a batch's samples, (B,): `loss_weights` (B,) times the weighted mean error of each.
    Their mean is the batch's loss.

    `prediction` and `target` (B, C, h, w), `timesteps` (B,) in [0, 1], `weighting` (B, 1, 1, 1) or None for 1.
    `mask` (B, 1, h, w) in [0, 1] is multiplied with the errors. Their mean is that of the whole picture, as in the
    reference, so that a small area is learnt weakly; with `divides_by_mask` it is that of the mask's area.
    """
    difference = prediction - target
    if loss_type == "l2":
        errors = difference.square()
    elif loss_type == "l1":
        errors = difference.abs()
    elif loss_type in ("huber", "smooth_l1"):
        threshold = _per_sample(huber_threshold(huber_schedule, timesteps, huber_c=huber_c, huber_scale=huber_scale))
        # 2 (sqrt(d^2 + c^2) - c): l1 far from 0, l2 / c near it; huber brings the far part to the scale of c.
        errors = 2 * (torch.sqrt(difference.square() + threshold.square()) - threshold)
        if loss_type == "huber":
            errors = threshold * errors
    else:
        raise ValueError(f"{loss_type} is not a loss type")
    if weighting is not None:
        errors = errors * weighting
    if mask is not None:
        errors = errors * mask
    means = errors.mean(dim=(1, 2, 3))
    if mask is not None and divides_by_mask:
        # An empty mask leaves 0.
        means = means / mask.mean(dim=(1, 2, 3)).clamp(min=_SMALLEST_AREA)
    return means * loss_weights


def huber_threshold(huber_schedule: str, timesteps: Tensor, *, huber_c: float, huber_scale: float) -> Tensor:
    """Where huber and smooth_l1 turn linear, (B,) for timesteps (B,) in [0, 1]."""
    if huber_schedule == "constant":
        return torch.full_like(timesteps, huber_c * huber_scale)
    if huber_schedule == "exponential":
        return torch.exp(math.log(huber_c) * timesteps) * huber_scale
    raise ValueError(f"the huber schedule {huber_schedule} does not apply to FLUX; use constant or exponential")


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]
