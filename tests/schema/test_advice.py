"""What a run is told at its start: deviations from the reference trainer, and defaults that train badly."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.schema.advice import deviations, weak_defaults
from trainer.schema.cli import ParsedCommand, validate_options
from trainer.schema.option_status import STATUS
from trainer.schema.presets import list_presets

GOOD: dict[str, object] = {
    "network_module": "networks.lora_flux",
    "learning_rate": 1e-4,
    "model_prediction_type": "raw",
    "timestep_sampling": "flux_shift",
    "guidance_scale": 1.0,
    "network_dim": 16,
    "network_alpha": 16,
}


def command(**values: object) -> ParsedCommand:
    return validate_options(values, where="test")


def weak(**values: object) -> str | None:
    given = command(**values)
    return weak_defaults(given.options, given.explicit)


def test_all_defaults_that_train_badly_are_one_line_with_the_values_to_use() -> None:
    line = weak(network_dim=16)
    assert line is not None
    assert line.startswith("THESE SETTINGS TRAIN BADLY")
    for piece in (
        "model_prediction_type sigma_scaled (its output does not match the target; use raw)",
        "timestep_sampling sigma (use flux_shift)",
        "guidance_scale 3.5 (use 1.0)",
        "learning_rate 2e-06 (use 1e-4)",
        "network_alpha 1, which is 1/16 of the strength (use 16, the rank)",
    ):
        assert piece in line


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("network_dim", "network_module")])
def test_a_default_that_trains_badly_is_named_until_it_is_chosen(name: str) -> None:
    assert weak(**GOOD) is None
    line = weak(**{key: value for key, value in GOOD.items() if key != name})
    assert line is not None
    assert line.count("(") == 1
    assert name in line


def test_chosen_values_are_not_commented_on_but_for_the_prediction_type() -> None:
    chosen = {**GOOD, "learning_rate": 2e-6, "timestep_sampling": "sigma", "guidance_scale": 3.5, "network_alpha": 1}
    assert weak(**chosen) is None
    assert "additive" in str(weak(**{**GOOD, "model_prediction_type": "additive"}))


def test_schnell_has_no_guidance_to_choose() -> None:
    given = command(**{key: value for key, value in GOOD.items() if key != "guidance_scale"})
    assert weak_defaults(given.options, given.explicit, has_guidance=False) is None


def test_the_presets_for_a_purpose_leave_no_bad_default_in_force() -> None:
    purposes = [preset for preset in list_presets() if preset.kind != "vram"]
    assert len(purposes) >= 4
    for preset in purposes:
        assert weak(**{name: value for name, value in preset.values.items() if name in STATUS}) is None, preset.name


@pytest.mark.parametrize(
    ("values", "piece"),
    [
        ({}, "quick_gelu"),
        ({"gradient_checkpointing": True}, "T5's dropout"),
        ({"mixed_precision": "bf16"}, "exact timestep"),
        ({"mixed_precision": "bf16"}, "noise and target are float32"),
        ({"mixed_precision": "fp16"}, "the autoencoder in 32 bit"),
        ({"max_timestep": 600}, "only timesteps from 0 to 600 are trained"),
        ({"sample_prompts": Path("p.txt"), "network_dropout": 0.1}, "without the LoRA's dropout"),
    ],
)
def test_a_deviation_is_one_line_when_it_is_in_effect(values: dict[str, object], piece: str) -> None:
    lines = list(deviations(command(**values).options))
    assert len([line for line in lines if piece in line]) == 1
    assert all("\n" not in line for line in lines)


def test_going_on_is_a_deviation_only_when_it_is_asked_for() -> None:
    for words in ({"resume": "x-state"}, {"initial_step": 3}, {"initial_epoch": 2}):
        assert any("steps are counted on" in line for line in deviations(command(**words).options))
    assert not any("steps are counted on" in line for line in deviations(command(initial_step=0).options))


def test_what_is_done_as_the_reference_does_it_is_no_deviation() -> None:
    same = command(clip_l_activation="gelu", mixed_precision="bf16", round_timesteps=True, cache_latents_to_disk=True)
    assert list(deviations(same.options)) == []


def test_several_processes_and_schnell_have_lines_of_their_own() -> None:
    options = command(
        clip_l_activation="gelu", sample_prompts="p.txt", lr_scheduler="linear", lr_warmup_steps=10
    ).options
    pieces = [line.split(";")[0] for line in deviations(options, is_schnell=True, num_processes=2)]
    assert pieces == [
        "samples use schnell's own schedule",
        "each of the 2 processes draws its own noise",
        "the warm-up is 10 steps",
    ]


def test_the_strength_of_an_untouched_alpha_depends_on_the_kind_of_network() -> None:
    without_alpha = {key: value for key, value in GOOD.items() if key != "network_alpha"}
    line = weak(**without_alpha, network_args=("rslora=1",))
    assert line is not None
    assert "network_alpha 1, which is 1/4 of the strength (use 16, the rank)" in line
    assert weak(**{**without_alpha, "network_module": "networks.oft_flux"}) is None
