"""Training that writes and starts from LoRAs of other forms, by the real command."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.lora.random_lora import assert_same_tensors
from tests.runs.commands import train
from tests.tiny import TinyModels, make_tiny_dataset

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]
NO_MOVE = "--learning_rate=1e-30"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("dataset"), count=2)


def run(models: TinyModels, dataset: Path, output_dir: Path, *more: str) -> Path:
    finished = train(
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={output_dir}",
        "--output_name=lora",
        "--network_dim=4",
        "--cache_latents",
        "--t5xxl_max_token_length=16",
        "--timestep_sampling=sigmoid",
        "--model_prediction_type=raw",
        "--max_train_steps=1",
        "--seed=3",
        *more,
    )
    assert finished.code == 0, finished.output
    return output_dir / "lora.safetensors"


def test_a_diffusers_lora_is_written_and_trained_on_without_a_bit_lost(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    first = run(tiny_models, dataset, tmp_path / "1", "--lora_form=diffusers", "--learning_rate=1e-2")
    state = load_file(first)
    assert {key.split(".")[0] for key in state} == {"transformer", "text_encoder"}
    assert state["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"].abs().max() > 0
    weights = f"--network_weights={first}"
    second = run(tiny_models, dataset, tmp_path / "2", "--lora_form=diffusers", NO_MOVE, weights)
    assert_same_tensors(load_file(second), state)
    published = run(tiny_models, dataset, tmp_path / "3", NO_MOVE, weights, "--network_alpha=4")
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in load_file(published)


def test_a_bfl_lora_is_whole_and_trained_on_without_a_bit_lost(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    more = ("--lora_form=bfl", "--network_train_unet_only")
    first = run(tiny_models, dataset, tmp_path / "1", *more, "--learning_rate=1e-2")
    state = load_file(first)
    assert "img_in.lora_A.weight" in state
    assert "single_blocks.0.norm.key_norm.scale" in state
    second = run(tiny_models, dataset, tmp_path / "2", *more, NO_MOVE, f"--network_weights={first}")
    assert_same_tensors(load_file(second), state)


def test_a_form_that_cannot_hold_what_is_trained_is_refused_before_training(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    arguments = [*tiny_models.arguments(), f"--dataset_config={dataset}", f"--output_dir={tmp_path}"]
    finished = train(*arguments, "--lora_form=xlabs")
    assert finished.code == 2
    assert "no place for a text encoder's LoRA" in finished.output
    assert "lora_unet_double_blocks_0_img_mod_lin" in finished.output
    assert "Traceback" not in finished.output
