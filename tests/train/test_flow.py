"""The flow's formulas where no recorded number reaches: limits, invariants, and options that must not matter."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from tests.tiny import TinyModels
from trainer.model.weights import load_flux
from trainer.train.conditioning import TextInputs
from trainer.train.flow import (
    add_noise,
    apply_prediction_type,
    huber_threshold,
    limit_sigmas,
    mu_for_tokens,
    sample_losses,
    sample_sigmas,
    shift_sigmas,
)
from trainer.train.objective import FlowBatch, FlowObjective, FlowSettings


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(sampling: str, count: int, *, scheme: str = "none", mode_scale: float = 1.29, side: int = 64) -> torch.Tensor:
    return sample_sigmas(
        sampling,
        count,
        latent_height=side,
        latent_width=side,
        sigmoid_scale=1.0,
        discrete_flow_shift=3.0,
        weighting_scheme=scheme,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=mode_scale,
        generator=seeded(),
    )


def test_mu_goes_through_its_two_points_and_on_beyond_them() -> None:
    assert mu_for_tokens(256) == 0.5
    assert mu_for_tokens(4096) == pytest.approx(1.15)
    assert math.exp(mu_for_tokens(1024)) == pytest.approx(1.878, abs=1e-3)
    assert mu_for_tokens(8192) == pytest.approx(1.15 + 0.65 * 4096 / 3840)


def test_a_shift_of_one_changes_nothing_and_the_ends_never_move() -> None:
    levels = torch.linspace(0, 1, 11)
    assert torch.equal(shift_sigmas(levels, 1.0), levels)
    assert shift_sigmas(levels, 3.0)[[0, -1]].tolist() == [0.0, 1.0]
    assert shift_sigmas(torch.tensor([0.5]), 3.0).item() == pytest.approx(0.75)


@pytest.mark.parametrize("sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
def test_noise_levels_lie_between_zero_and_one(sampling: str) -> None:
    sigmas = draw(sampling, 5000)
    assert sigmas.shape == (5000,)
    assert sigmas.dtype == torch.float32
    assert sigmas.min() >= 0
    assert sigmas.max() <= 1


def test_larger_pictures_train_at_higher_noise_with_flux_shift() -> None:
    small, large = draw("flux_shift", 5000, side=32), draw("flux_shift", 5000, side=128)
    assert (large > small).all()
    assert large.mean() > small.mean() + 0.1


def test_a_mode_draw_beyond_the_table_takes_its_last_entry() -> None:
    # With this scale a third of the draws lie outside [0, 1).
    sigmas = draw("sigma", 2000, scheme="mode", mode_scale=10.0)
    assert sigmas.min() == pytest.approx(3 * 0.001 / (1 + 2 * 0.001))
    assert sigmas.max() == 1.0


def test_an_unknown_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="cubic is not a timestep sampling"):
        draw("cubic", 1)


def test_no_noise_and_all_noise_give_the_two_ends() -> None:
    latents, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    noisy = add_noise(
        latents,
        noise,
        torch.tensor([0.0, 1.0]),
        ip_noise_gamma=None,
        ip_noise_gamma_random_strength=False,
        generator=seeded(),
    )
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[1], noise[1])


def test_input_perturbation_of_random_strength_is_weaker_and_one_factor_for_the_batch() -> None:
    latents, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)

    def extra(random_strength: bool) -> torch.Tensor:
        noisy = add_noise(
            latents,
            noise,
            torch.ones(3),
            ip_noise_gamma=0.5,
            ip_noise_gamma_random_strength=random_strength,
            generator=seeded(7),
        )
        return noisy - noise

    ratio = extra(True) / extra(False)
    assert 0 < ratio.median() < 1
    assert torch.allclose(ratio, ratio.median().expand_as(ratio), atol=1e-2)


def test_only_sigma_scaled_brings_loss_weights() -> None:
    velocity, noisy = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    sigmas = torch.tensor([0.25, 0.5])
    assert apply_prediction_type("raw", velocity, noisy, sigmas, "sigma_sqrt")[1] is None
    assert apply_prediction_type("additive", velocity, noisy, sigmas, "sigma_sqrt")[1] is None
    _, weighting = apply_prediction_type("sigma_scaled", velocity, noisy, sigmas, "sigma_sqrt")
    assert weighting is not None
    assert weighting.flatten().tolist() == [16.0, 4.0]
    with pytest.raises(ValueError, match="not a prediction type"):
        apply_prediction_type("epsilon", velocity, noisy, sigmas, "none")


def loss_of(
    loss_type: str, difference: float, loss_weights: tuple[float, float] = (1, 1), schedule: str = "constant"
) -> float:
    return (
        sample_losses(
            torch.full((2, 16, 4, 4), difference),
            torch.zeros(2, 16, 4, 4),
            torch.tensor([0.0, 1.0]),
            loss_type=loss_type,
            huber_schedule=schedule,
            huber_c=0.1,
            huber_scale=1.0,
            weighting=None,
            loss_weights=torch.tensor(loss_weights),
        )
        .mean()
        .item()
    )


def test_losses_have_their_closed_forms() -> None:
    root = math.sqrt(4 + 0.01) - 0.1
    assert loss_of("l2", 2.0) == pytest.approx(4.0)
    assert loss_of("l1", 2.0) == pytest.approx(2.0)
    assert loss_of("smooth_l1", 2.0) == pytest.approx(2 * root, rel=1e-6)
    assert loss_of("huber", 2.0) == pytest.approx(0.2 * root, rel=1e-6)
    with pytest.raises(ValueError, match="cauchy is not a loss type"):
        loss_of("cauchy", 2.0)


def test_a_samples_weight_scales_its_part_of_the_mean() -> None:
    assert loss_of("l2", 2.0, loss_weights=(0.5, 1.0)) == pytest.approx(0.75 * 4.0)


def test_the_exponential_threshold_falls_from_one_to_huber_c() -> None:
    sigmas = torch.tensor([0.0, 0.5, 1.0])
    thresholds = huber_threshold("exponential", sigmas, huber_c=0.01, huber_scale=2.0)
    assert thresholds.tolist() == pytest.approx([2.0, 0.2, 0.02])
    with pytest.raises(ValueError, match="snr does not apply"):
        loss_of("huber", 1.0, schedule="snr")
    assert loss_of("l2", 1.0, schedule="snr") == 1.0


def test_timesteps_stay_in_the_range_and_keep_the_form_of_their_draw() -> None:
    sigmas = torch.linspace(0, 1, 11)
    assert limit_sigmas(sigmas, None, None) is sigmas
    assert limit_sigmas(sigmas, 0, 1000) is sigmas
    limited = limit_sigmas(sigmas, 200, 700)
    assert limited.min() == pytest.approx(0.2)
    assert limited.max() == pytest.approx(0.7)
    torch.testing.assert_close(limited.diff(), torch.full((10,), 0.05))
    assert limit_sigmas(sigmas, None, 300).max() == pytest.approx(0.3)


@pytest.mark.parametrize("sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
def test_a_run_trains_no_timestep_outside_its_range(tiny_models: TinyModels, sampling: str) -> None:
    model = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    settings = FlowSettings(
        timestep_sampling=sampling,
        sigmoid_scale=1.0,
        discrete_flow_shift=3.0,
        weighting_scheme="uniform",
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        model_prediction_type="raw",
        guidance_scale=1.0,
        loss_type="l2",
        huber_schedule="constant",
        huber_c=0.1,
        huber_scale=1.0,
        ip_noise_gamma=None,
        ip_noise_gamma_random_strength=False,
        min_timestep=250,
        max_timestep=500,
    )

    def batch(settings: FlowSettings) -> FlowBatch:
        objective = FlowObjective(
            model,
            lambda captions: TextInputs(torch.zeros(len(captions), 1, 64), torch.zeros(len(captions), 32), None),
            settings,
            autocast=contextlib.nullcontext,
            compute_dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        draw = torch.Generator().manual_seed(1)
        return objective.draw(torch.zeros(200, 16, 2, 2), [""] * 200, torch.ones(200), draw)

    exact = batch(settings)
    assert 0.25 <= exact.sigmas.min() < 0.35
    assert 0.4 < exact.sigmas.max() <= 0.5
    assert torch.equal(exact.timesteps, exact.sigmas)
    rounded = batch(replace(settings, rounds_timesteps=True))
    assert len(rounded.timesteps.unique()) < len(exact.timesteps.unique())
    # Only the discrete table rounds the level that mixes the noise, as in the reference.
    assert torch.equal(rounded.sigmas, exact.sigmas) == (sampling != "sigma")
    torch.testing.assert_close(rounded.timesteps, exact.timesteps, atol=0.003, rtol=0)
