"""Training that writes and starts from LoRAs of other forms, by the real command."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora.random_lora import assert_same_tensors
from tests.runs.in_process import answer as train
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.schema.checkpoint_header import read_header

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
    assert_files_are_recorded(first, tiny_models)
    weights = f"--network_weights={first}"
    second = run(tiny_models, dataset, tmp_path / "2", "--lora_form=diffusers", NO_MOVE, weights)
    assert_same_tensors(load_file(second), state)
    published = run(tiny_models, dataset, tmp_path / "3", NO_MOVE, weights, "--network_alpha=4")
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in load_file(published)


def assert_files_are_recorded(lora: Path, models: TinyModels) -> None:
    """Every model file with its whole hash, which is computed beside the training and there at its end."""
    metadata = read_header(lora).metadata
    for path, name, sha256 in (
        (models.flux_dev, "ss_sd_model_name", "ss_new_sd_model_hash"),
        (models.ae, "ss_vae_name", "ss_new_vae_hash"),
        (models.ae, "ss_fluxgui_ae_name", "ss_fluxgui_new_ae_hash"),
        (models.clip_l, "ss_fluxgui_clip_l_name", "ss_fluxgui_new_clip_l_hash"),
        (models.t5xxl, "ss_fluxgui_t5xxl_name", "ss_fluxgui_new_t5xxl_hash"),
    ):
        assert (metadata[name], metadata[sha256]) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert metadata["ss_fluxgui_lora_form"] == "diffusers"
    assert metadata["ss_fluxgui_weight_dtype"] == "float32"
    assert metadata["ss_fluxgui_blocks_to_swap"] == "0"
    assert metadata["ss_fluxgui_t5xxl_max_token_length"] == "16"


def test_an_xlabs_lora_holds_the_attention_that_was_trained(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    more = ("--lora_form=xlabs", "--network_train_unet_only", "--save_precision=bf16", "--learning_rate=1e-2")
    only = ("train_blocks=double", "img_mlp_dim=0", "txt_mlp_dim=0", "img_mod_dim=0", "txt_mod_dim=0")
    state = load_file(run(tiny_models, dataset, tmp_path, *more, "--network_args", *only))
    assert len(state) == 2 * 4 * 2, "two blocks, four layers each, down and up"
    assert state["double_blocks.1.processor.qkv_lora2.up.weight"].abs().max() > 0
    assert {str(tensor.dtype) for tensor in state.values()} == {"torch.bfloat16"}


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


def test_a_lora_of_another_model_is_refused_before_a_model_is_loaded(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    save_file({"unet.down_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "sd.safetensors")
    arguments = [*tiny_models.arguments(), f"--dataset_config={dataset}", f"--output_dir={tmp_path / 'out'}"]
    finished = train(*arguments, f"--network_weights={tmp_path / 'sd.safetensors'}")
    assert finished.code == 3
    assert "this is no LoRA for FLUX.1 in a form that is known here" in finished.output
    assert "unet.down_blocks.0.attn.to_q.lora_A.weight" in finished.output
    assert "Traceback" not in finished.output
