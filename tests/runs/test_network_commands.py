"""The kinds of network and their settings through the real command, on tiny files: what the written file then holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.runs.in_process import Answer
from tests.runs.in_process import answer as train
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.lora.split import SPLIT_ALPHA_KEY, part_slices, unmerge_up

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
SINGLE = "lora_unet_single_blocks_1_linear1"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("dataset"), count=2)


def run(models: TinyModels, dataset: Path, output_dir: Path, *more: str) -> Answer:
    return train(
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={output_dir}",
        "--output_name=lora",
        "--network_dim=4",
        "--cache_latents",
        "--t5xxl_max_token_length=16",
        "--timestep_sampling=sigmoid",
        "--model_prediction_type=raw",
        "--guidance_scale=1.0",
        "--learning_rate=1e-3",
        "--max_train_steps=2",
        "--seed=3",
        "--device=cpu",
        *more,
    )


def trained(models: TinyModels, dataset: Path, output_dir: Path, *more: str) -> tuple[dict[str, Tensor], str]:
    finished = run(models, dataset, output_dir, *more)
    assert finished.code == 0, finished.output
    state = load_file(output_dir / "lora.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.values())
    return state, finished.output


FLUX_ONLY = ("--network_train_unet_only", "--cache_text_encoder_outputs")
HARD = ("--blocks_to_swap=1", "--gradient_checkpointing", "--mixed_precision=bf16")


def test_split_qkv_writes_block_diagonal_layers_with_the_alpha_of_their_rank_and_goes_on_from_them(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    state, output = trained(
        tiny_models,
        dataset,
        tmp_path / "first",
        *FLUX_ONLY,
        *HARD,
        "--network_args",
        "split_qkv=true",
        "rank_dropout=0.1",
    )
    assert "split qkv" in output
    for name, parts, alpha in ((QKV, 3, 3), (SINGLE, 4, 4)):
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        assert down.shape[0] == 4 * parts
        assert int(state[f"{name}.alpha"]) == alpha
        width = down.shape[1]
        sizes = (width,) * 3 if parts == 3 else (width, width, width, up.shape[0] - 3 * width)
        rows = unmerge_up(up, part_slices(sizes))
        assert rows is not None, "nothing beside the diagonal"
        assert all(rows[part].abs().max() > 0 for part in part_slices(sizes)), "every part has learnt"
    assert int(state["lora_unet_double_blocks_0_img_attn_proj.alpha"]) == 1
    with safe_open(tmp_path / "first" / "lora.safetensors", framework="pt") as file:
        assert file.metadata()[SPLIT_ALPHA_KEY] == "merged"

    first = tmp_path / "first" / "lora.safetensors"
    more = (f"--network_weights={first}", "--dim_from_weights", "--learning_rate=1e-9", "--network_args", "verbose=1")
    again, output = trained(tiny_models, dataset, tmp_path / "second", *FLUX_ONLY, *more)
    assert "ranks and alphas of the file, split qkv" in output
    assert f"{QKV}: rank 4" in output
    assert again.keys() == state.keys()
    for key, tensor in again.items():
        torch.testing.assert_close(tensor, state[key], atol=1e-7, rtol=0)


def test_loraplus_moves_the_ups_further_by_its_ratio(tiny_models: TinyModels, dataset: Path, tmp_path: Path) -> None:
    """Adam's first step is the learning rate for every number that has a gradient."""
    state, _ = trained(
        tiny_models,
        dataset,
        tmp_path,
        *FLUX_ONLY,
        "--max_train_steps=1",
        "--network_args",
        "loraplus_lr_ratio=16",
        "network_reg_lrs=single_blocks_1=2e-4,img_mlp=0",
    )
    assert float(state[f"{QKV}.lora_up.weight"].abs().max()) == pytest.approx(16e-3, rel=0.05)
    assert float(state[f"{SINGLE}.lora_up.weight"].abs().max()) == pytest.approx(16 * 2e-4, rel=0.05)
    assert float(state["lora_unet_double_blocks_0_img_mlp_0.lora_up.weight"].abs().max()) == 0


def test_dora_writes_magnitudes_and_the_norm_limit_holds(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    limit = 1e-3
    state, output = trained(
        tiny_models, dataset, tmp_path, *FLUX_ONLY, *HARD, f"--scale_weight_norms={limit}", "--network_args", "dora=1"
    )
    assert "DoRA" in output
    base = load_file(tiny_models.flux_dev)["double_blocks.0.img_attn.qkv.weight"].float().norm(dim=0)
    magnitude = state[f"{QKV}.dora_scale"]
    assert magnitude.shape == (1, base.shape[0])
    assert 1e-4 < (magnitude[0] - base).abs().max() < 5e-3, "two steps at the rate 1e-3"
    change = state[f"{QKV}.lora_up.weight"] @ state[f"{QKV}.lora_down.weight"] / 4
    assert float(change.norm()) == pytest.approx(limit, rel=0.01)


def test_oft_writes_its_own_keys_for_the_attention_layers(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    state, output = trained(
        tiny_models,
        dataset,
        tmp_path,
        *FLUX_ONLY,
        *HARD,
        "--network_module=networks.oft_flux",
        "--network_alpha=1e-3",
        "--network_args",
        "enable_all_linear=False",
    )
    names = {key.split(".")[0] for key in state}
    assert len(names) == 8, "qkv and proj, picture and text, of two double blocks"
    assert "OFT on 8 layers, 4 blocks each" in output
    blocks = state["oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.2"]
    assert blocks.shape == (4, 24, 24)
    assert blocks.abs().max() > 0
    assert "oft_unet_double_blocks_0_img_attn_proj.oft_blocks.1" not in state
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.oft_flux"


def test_both_text_encoders_learn_and_a_lora_is_merged_before(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    state, _ = trained(
        tiny_models,
        dataset,
        tmp_path / "first",
        "--gradient_checkpointing",
        "--text_encoder_lr",
        "1e-3",
        "2e-3",
        "--max_train_steps=1",
        "--network_args",
        "train_t5xxl=True",
    )
    clip, t5 = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_v"
    assert float(state[f"{clip}.lora_up.weight"].abs().max()) == pytest.approx(1e-3, rel=0.05)
    assert float(state[f"{t5}.lora_up.weight"].abs().max()) == pytest.approx(2e-3, rel=0.05)
    first = tmp_path / "first" / "lora.safetensors"
    more = ("--network_train_text_encoder_only", f"--base_weights={first}", "--base_weights_multiplier=0.5")
    state, output = trained(tiny_models, dataset, tmp_path / "second", *more)
    assert {key.partition("_unet_")[1] for key in state} == {""}, "nothing of FLUX"
    assert state[f"{clip}.lora_up.weight"].abs().max() > 0
    assert f"merged 32 layers of {first} at strength 0.5" in output


def test_a_wrong_setting_ends_at_once_with_the_nearest_name(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    finished = run(tiny_models, dataset, tmp_path, "--network_args", "split_qvk=True")
    assert finished.code == 2
    assert '"split_qvk" is not a known key' in finished.output
    assert "Did you mean split_qkv?" in finished.output


def test_lycoris_trains_or_says_how_to_install_it(tiny_models: TinyModels, dataset: Path, tmp_path: Path) -> None:
    arguments = (*FLUX_ONLY, "--network_module=lycoris.kohya", "--network_args", "algo=lokr", "factor=4")
    if importlib.util.find_spec("lycoris") is None:
        finished = run(tiny_models, dataset, tmp_path, *arguments)
        assert finished.code == 2
        assert "Run: pip install lycoris-lora" in finished.output
        return
    state, output = trained(tiny_models, dataset, tmp_path, *arguments)
    assert "LyCORIS (lokr) on 32 layers" in output
    assert any(key.startswith(f"{QKV}.lokr_w") for key in state)
