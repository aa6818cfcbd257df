"""Options that have no effect without another one: each is named when it is given alone."""

from __future__ import annotations

import pytest

from trainer.schema.cli import parse_command_line
from trainer.schema.idle_options import WITH_NEEDS

ALONE = {
    "sigmoid_scale": "--sigmoid_scale=2",
    "discrete_flow_shift": "--discrete_flow_shift=2 --timestep_sampling=uniform",
    "weighting_scheme": "--weighting_scheme=logit_normal --timestep_sampling=shift",
    "logit_mean": "--logit_mean=1 --weighting_scheme=logit_normal --timestep_sampling=shift",
    "logit_std": "--logit_std=2",
    "mode_scale": "--mode_scale=1 --weighting_scheme=logit_normal",
    "huber_c": "--huber_c=0.2",
    "huber_scale": "--huber_scale=2 --loss_type=l1",
    "huber_schedule": "--huber_schedule=constant",
    "ip_noise_gamma_random_strength": "--ip_noise_gamma_random_strength",
    "round_timesteps": "--round_timesteps",
    "no_half_vae": "--no_half_vae --mixed_precision=fp16",
    "text_encoder_batch_size": "--text_encoder_batch_size=2",
    "skip_cache_check": "--skip_cache_check --cache_latents",
    "save_last_n_epochs": "--save_last_n_epochs=2",
    "save_last_n_steps": "--save_last_n_steps=2 --save_every_n_epochs=1",
    "save_last_n_epochs_state": "--save_last_n_epochs_state=2 --save_every_n_epochs=1",
    "save_last_n_steps_state": "--save_last_n_steps_state=2 --save_state",
    "save_every_n_epochs": "--save_every_n_epochs=2 --save_n_epoch_ratio=3",
    "initial_epoch": "--initial_epoch=2 --initial_step=5",
    "log_prefix": "--log_prefix=a",
    "log_tracker_name": "--log_tracker_name=a",
    "sample_prompts": "--sample_prompts=a.txt",
    "training_comment": "--training_comment=a --no_metadata",
    "tokenizer_cache_dir": "--tokenizer_cache_dir=a --clip_l_tokenizer=b --t5xxl_tokenizer=c",
}


def idle(command: str) -> list[str]:
    return [note.split()[0] for note in parse_command_line(command.split()).notes if " has no effect" in note]


def test_every_one_is_tried() -> None:
    assert ALONE.keys() == WITH_NEEDS


@pytest.mark.parametrize("name", ALONE)
def test_given_alone_it_is_named(name: str) -> None:
    assert name in idle(ALONE[name])


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--sigmoid_scale=1.0 --huber_c=0.1 --weighting_scheme=uniform",
        "--sigmoid_scale=2 --discrete_flow_shift=2 --timestep_sampling=shift",
        "--weighting_scheme=logit_normal --logit_mean=1 --logit_std=2",
        "--weighting_scheme=sigma_sqrt --timestep_sampling=shift",
        "--loss_type=huber --huber_c=0.2 --huber_scale=2 --huber_schedule=constant",
        "--save_state --save_n_epoch_ratio=2 --save_last_n_epochs=3 --save_last_n_epochs_state=1",
        "--sample_prompts=a.txt --sample_at_first",
    ],
)
def test_with_what_it_needs_or_at_its_default_nothing_is_said(command: str) -> None:
    assert idle(command) == []


def test_a_switch_of_network_args_that_sd_scripts_would_leave_off_is_named() -> None:
    notes = parse_command_line(["--network_args", "train_t5xxl=true", "split_qkv=True"]).notes
    (line,) = [note for note in notes if "sd-scripts takes True alone" in note]
    assert line.startswith("train_t5xxl=true of network_args switches it on")


def test_a_compiler_that_is_none_is_named() -> None:
    assert idle("--torch_compile --dynamo_backend=no") == ["torch_compile"]
    assert "torch_compile" not in idle("--torch_compile --dynamo_backend=eager")
