"""Noise levels, noisy latents, predictions and losses against recorded reference numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.data.masks import to_latent_size
from trainer.model.packing import unpack_latents
from trainer.train.flow import (
    NUM_TABLE_TIMESTEPS,
    add_noise,
    apply_prediction_type,
    rounded_timesteps,
    sample_losses,
    sample_sigmas,
    shift_sigmas,
    velocity_target,
)
from trainer.train.sampling import sample_schedule

SIGMA_LIMIT = 1e-6
LOSS_LIMIT = 1e-6
_GOLDEN = Path(__file__).parent.parent / "golden"
_TIMESTEPS = cast("dict[str, Any]", json.loads((_GOLDEN / "timesteps.json").read_text()))
_LOSSES = {
    name: case
    for name, case in cast("dict[str, Any]", json.loads((_GOLDEN / "prediction_loss.json").read_text())).items()
    if "options" in case
}


class Settings(TypedDict):
    """The options that the recorded cases vary, at their defaults until given."""

    timestep_sampling: str
    sigmoid_scale: float
    discrete_flow_shift: float
    weighting_scheme: str
    model_prediction_type: str
    loss_type: str
    huber_schedule: str
    huber_c: float
    huber_scale: float
    ip_noise_gamma: float | None


def settings_of(case: dict[str, Any]) -> Settings:
    values: dict[str, Any] = {name: _TIMESTEPS["defaults"][name] for name in Settings.__annotations__}
    options = cast("list[str]", case["options"])
    for option, text in zip(options[::2], options[1::2], strict=True):
        name = option.removeprefix("--")
        values[name] = text if isinstance(values[name], str) else float(text)
    return cast("Settings", values)


def draw_sigmas(settings: Settings, shape: list[int], generator: torch.Generator) -> Tensor:
    return sample_sigmas(
        settings["timestep_sampling"],
        shape[0],
        latent_height=shape[2],
        latent_width=shape[3],
        sigmoid_scale=settings["sigmoid_scale"],
        discrete_flow_shift=settings["discrete_flow_shift"],
        weighting_scheme=settings["weighting_scheme"],
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        generator=generator,
    )


def assert_near(ours: Tensor, recorded: Tensor, limit: float = SIGMA_LIMIT) -> None:
    torch.testing.assert_close(ours, recorded, atol=limit, rtol=0)


@pytest.mark.parametrize("case", list(_TIMESTEPS["cases"]))
def test_the_recorded_seed_gives_the_recorded_noise_levels_and_noisy_latents(golden: Path, case: str) -> None:
    data = load_file(golden / "timesteps.safetensors")
    entry = _TIMESTEPS["cases"][case]
    settings = settings_of(entry)
    generator = torch.Generator().manual_seed(entry.get("seed", entry.get("seed_without_noise_draw")))
    noise = torch.randn(entry["shape"], generator=generator) if "seed" in entry else None
    sigmas = draw_sigmas(settings, entry["shape"], generator)
    assert_near(sigmas, data[f"{case}.sigmas_fp32"].flatten())
    assert_near(sigmas * 1000, data[f"{case}.timesteps_fp32"], 1000 * SIGMA_LIMIT)
    if noise is None or f"{case}.noisy" not in data:
        return
    assert torch.equal(noise, data[f"{case}.noise"])
    noisy = add_noise(
        data[f"{case}.latents"],
        noise,
        sigmas,
        ip_noise_gamma=settings["ip_noise_gamma"],
        ip_noise_gamma_random_strength=False,
        generator=generator,
    )
    assert_near(noisy, data[f"{case}.noisy"])


def test_the_cases_cover_every_sampling() -> None:
    samplings = {settings_of(case)["timestep_sampling"] for case in _TIMESTEPS["cases"].values()}
    assert samplings == {"sigma", "uniform", "sigmoid", "shift", "flux_shift"}


@pytest.mark.parametrize("shift", [1.0, 3.0, 3.1582])
def test_the_shifted_table_is_the_schedulers(golden: Path, shift: float) -> None:
    table = torch.arange(NUM_TABLE_TIMESTEPS, 0, -1) / NUM_TABLE_TIMESTEPS
    recorded = load_file(golden / "timesteps.safetensors")[f"scheduler_shift{shift}.sigmas"]
    assert_near(shift_sigmas(table, shift), recorded)


@pytest.mark.parametrize(("num_steps", "num_tokens"), [(20, 1024), (28, 4096), (4, 256)])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_the_sampling_schedule_is_the_recorded_one(
    golden: Path, num_steps: int, num_tokens: int, is_shifted: bool
) -> None:
    recorded = load_file(golden / "timesteps.safetensors")[
        f"sample_schedule.n{num_steps}.seq{num_tokens}.shift{int(is_shifted)}"
    ]
    assert_near(sample_schedule(num_steps, num_tokens, is_shifted=is_shifted), recorded)


@pytest.mark.parametrize("name", list(_LOSSES))
def test_the_recorded_model_output_gives_the_recorded_loss(golden: Path, name: str) -> None:
    data, case = load_file(golden / "prediction_loss.safetensors"), _LOSSES[name]
    settings = settings_of(case)
    latents, noise = data["latents"], data["noise"]
    generator = torch.Generator().manual_seed(case["seed"])
    assert torch.equal(torch.randn(noise.shape, generator=generator), noise)
    sigmas = draw_sigmas(settings, list(latents.shape), generator)
    noisy = add_noise(
        latents, noise, sigmas, ip_noise_gamma=None, ip_noise_gamma_random_strength=False, generator=generator
    )
    target = velocity_target(latents, noise)
    assert torch.equal(target, data["target"])
    velocity = unpack_latents(data["model_output_packed"], latents.shape[2], latents.shape[3])
    prediction, weighting = apply_prediction_type(
        settings["model_prediction_type"], velocity, noisy, sigmas, settings["weighting_scheme"]
    )

    def loss() -> Tensor:
        return sample_losses(
            prediction,
            target,
            sigmas,
            loss_type=settings["loss_type"],
            huber_schedule=settings["huber_schedule"],
            huber_c=settings["huber_c"],
            huber_scale=settings["huber_scale"],
            weighting=weighting,
            loss_weights=data["loss_weights"],
            mask=to_latent_size(data["alpha_masks"], *target.shape[-2:])[:, None] if case.get("alpha_mask") else None,
        ).mean()

    if "error" in case:
        with pytest.raises(ValueError, match="snr does not apply to FLUX"):
            loss()
        return
    assert_near(sigmas * 1000, torch.tensor(case["timesteps"]), 1000 * SIGMA_LIMIT)
    if f"{name}.model_pred" in data:
        assert_near(prediction, data[f"{name}.model_pred"])
    if "weighting" in case:
        assert (weighting is None) == (case["weighting"] is None)
    if weighting is not None and case.get("weighting") is not None:
        torch.testing.assert_close(weighting.flatten(), torch.tensor(case["weighting"]), rtol=2e-6, atol=0)
    assert loss().item() == pytest.approx(case["loss"], rel=LOSS_LIMIT)


@pytest.mark.parametrize("case", ["flux_shift", "shift", "uniform", "sigma_none", "sigma_logit_normal", "sigma_mode"])
def test_rounding_on_request_gives_the_references_timesteps(golden: Path, case: str) -> None:
    """bf16 training: what the reference reports, then divided and multiplied by 1000 in bf16 on the way to the model."""
    recorded = load_file(golden / "timesteps.safetensors")
    exact, reported = recorded[f"{case}.r0.sigmas_fp32"], recorded[f"{case}.r0.timesteps_bf16"]
    assert reported.dtype == torch.bfloat16
    given = 1000 * rounded_timesteps(exact, torch.bfloat16)
    torch.testing.assert_close(given, (reported / 1000 * 1000).float(), atol=1e-4, rtol=0)
    if case.startswith("sigma"):
        assert torch.equal(exact.bfloat16(), recorded[f"{case}.r0.sigmas_bf16"]), "the level is rounded by itself"
