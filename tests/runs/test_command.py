"""The command line of existing training commands on tiny files in the real formats.

What is about the command as a process starts one; the other trainings call the same function here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.diffusers_flux import diffusers_lora, in_diffusers
from tests.runs.commands import Finished, run_command, train
from tests.runs.in_process import Answer, answer
from tests.tiny import TinyModels, make_full_depth_flux, make_tiny_dataset
from trainer.lora.network import LoraNetwork
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_flux
from trainer.schema.checkpoint_header import read_header
from trainer.schema.folders import demo_dir
from trainer.schema.lora_spec import LoraSpec

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("dataset"), count=2)


def usual(models: TinyModels, dataset: Path, output_dir: Path, *more: str) -> list[str]:
    """A short training in float32 of FLUX's LoRA only, without what takes time."""
    return [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={output_dir}",
        "--output_name=lora",
        "--network_module=networks.lora_flux",
        "--network_dim=4",
        "--network_train_unet_only",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=16",
        "--timestep_sampling=sigmoid",
        "--model_prediction_type=raw",
        "--guidance_scale=1.0",
        "--learning_rate=1e-2",
        "--max_train_steps=2",
        "--seed=3",
        *more,
    ]


def assert_succeeded(finished: Finished | Answer) -> None:
    assert finished.code == 0, finished.output


def test_the_well_known_command_runs_verbatim_under_accelerate(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path, golden: Path
) -> None:
    """Every option of it does what it says, on a model with the published number of blocks."""
    flux = make_full_depth_flux(tmp_path / "flux1-dev.safetensors")
    output = tmp_path / "output"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    tokenizers = [argument for argument in tiny_models.arguments() if "tokenizer" in argument]
    command = [
        *launch,
        "--num_cpu_threads_per_process",
        "1",
        "flux_train_network.py",
        f"--pretrained_model_name_or_path={flux}",
        f"--clip_l={tiny_models.clip_l}",
        f"--t5xxl={tiny_models.t5xxl}",
        f"--ae={tiny_models.ae}",
        f"--dataset_config={dataset}",
        f"--output_dir={output}",
        "--output_name=my_flux_lora",
        "--save_model_as=safetensors",
        "--network_module=networks.lora",
        "--network_dim=16",
        "--network_alpha=1",
        "--learning_rate=1e-4",
        "--optimizer_type=AdamW8bit",
        "--lr_scheduler=constant",
        "--sdpa",
        "--max_train_epochs=10",
        "--save_every_n_epochs=1",
        "--mixed_precision=fp16",
        "--gradient_checkpointing",
        "--apply_t5_attn_mask",
        "--blocks_to_swap=18",
        *tokenizers,
    ]
    finished = run_command(command)
    assert_succeeded(finished)
    names = sorted(path.name for path in output.iterdir())
    assert names == [*(f"my_flux_lora-{n:06d}.safetensors" for n in range(1, 10)), "my_flux_lora.safetensors"]
    header = read_header(output / "my_flux_lora.safetensors")
    keys = set(header.tensors)
    full = set(json.loads((golden / "lora_keys_full_dev.json").read_text(encoding="utf-8"))["keys"])
    # The tiny CLIP-L has fewer layers than the published one; FLUX has all its blocks.
    assert {key for key in keys if key.startswith("lora_unet_")} == {
        key for key in full if key.startswith("lora_unet_")
    }
    clip_keys = {key for key in keys if key.startswith("lora_te1_")}
    assert clip_keys
    assert clip_keys <= full
    assert not any(key.startswith("lora_te3_") for key in keys)
    for key, info in header.tensors.items():
        assert info.dtype in ("F32", "I64"), key
        if key.endswith("lora_down.weight"):
            assert info.shape[0] == 16
    state = load_file(output / "my_flux_lora.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.values())
    assert {float(tensor) for key, tensor in state.items() if key.endswith("alpha")} == {1.0}
    # Both parts were trained: up starts at zero.
    for part in ("lora_unet_double_blocks_0_img_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        assert state[f"{part}.lora_up.weight"].abs().max() > 0
    metadata = header.metadata
    assert metadata["ss_optimizer"].endswith("AdamW8bit") or "AdamW8bit" in metadata["ss_optimizer"]
    assert metadata["ss_network_module"] == "networks.lora_flux"
    assert metadata["ss_mixed_precision"] == "fp16"
    assert metadata["ss_num_epochs"] == "10"
    assert metadata["ss_steps"] == "20"
    assert metadata["ss_apply_t5_attn_mask"] == "True"
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert len(re.findall(r"networks\.lora\b(?!_flux).*FLUX", finished.output)) == 1, (
        "one line says what it is taken for"
    )
    assert len(re.findall(r"sdpa", finished.output)) == 1, "an option without effect says so once"
    # Nothing is cached unless asked for.
    assert not list(dataset.parent.rglob(".flux_cache"))


def test_the_demo_command_writes_lora_and_samples(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    short = ("--max_train_epochs=1", "--sample_every_n_epochs=1")
    finished = run_command([sys.executable, "-m", "trainer", "demo", f"--output_dir={output}", *short])
    assert_succeeded(finished)
    assert (output / "demo.safetensors").is_file()
    samples = list((output / "sample").glob("*.png"))
    assert len(samples) == 8, "four prompts, before the first step and after the epoch"
    assert_same_effect_in_diffusers(output / "demo.safetensors", demo_dir() / "models" / "flux1-demo.safetensors")


def assert_same_effect_in_diffusers(lora: Path, flux_file: Path) -> None:
    """diffusers' LoRA loader takes the file (under its names), and the image tokens change as ours do."""
    ours = load_flux(flux_file, torch.float32, "cpu")
    theirs = cast("Any", in_diffusers(ours))
    generator = torch.Generator().manual_seed(5)
    params = ours.params
    img = torch.randn(1, 64, params.in_channels, generator=generator)
    txt = torch.randn(1, 12, params.context_in_dim, generator=generator)
    vec = torch.randn(1, params.vec_in_dim, generator=generator)
    timesteps, guidance = torch.tensor([0.4]), torch.tensor([2.0])
    state = load_file(lora)

    def run_ours() -> Tensor:
        with torch.no_grad():
            return ours(img, image_ids(8, 8), txt, text_ids(12), timesteps, vec, guidance)

    def run_theirs() -> Tensor:
        with torch.no_grad():
            return theirs(
                hidden_states=img,
                encoder_hidden_states=txt,
                pooled_projections=vec,
                timestep=timesteps,
                img_ids=image_ids(8, 8)[0],
                txt_ids=text_ids(12)[0],
                guidance=guidance,
                return_dict=False,
            )[0]

    base = run_ours()
    torch.testing.assert_close(base, run_theirs(), atol=1e-5, rtol=0)
    rank = state["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0]
    network = LoraNetwork.attach(ours, None, LoraSpec(rank=rank, alpha=rank), generator)
    report = network.load_file(lora)
    assert not report.missing
    assert not report.unexpected
    network.eval()
    theirs.load_lora_adapter(diffusers_lora(state, params.hidden_size), prefix="transformer")
    changed = run_ours()
    assert (changed - base).abs().max() > 0.05, "the LoRA does something"
    torch.testing.assert_close(changed, run_theirs(), atol=1e-4, rtol=0)


def test_block_swap_trains_exactly_the_same_lora(tiny_models: TinyModels, dataset: Path, tmp_path: Path) -> None:
    for name, more in (
        ("all", []),
        ("swapped", ["--blocks_to_swap=3"]),
        ("checkpointed", ["--blocks_to_swap=4", "--gradient_checkpointing"]),
    ):
        assert_succeeded(answer(*usual(tiny_models, dataset, tmp_path / name, *more)))
    reference = load_file(tmp_path / "all" / "lora.safetensors")
    for name in ("swapped", "checkpointed"):
        other = load_file(tmp_path / name / "lora.safetensors")
        assert reference.keys() == other.keys()
        for key, tensor in reference.items():
            assert torch.equal(tensor, other[key]), f"{name}: {key}"


def test_cached_and_uncached_text_train_alike_and_the_disk_cache_is_used_again(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    on_disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    for name in ("first", "second"):
        assert_succeeded(answer(*usual(tiny_models, dataset, tmp_path / name, *on_disk)))
    cached = {
        path.name: path.stat().st_mtime_ns
        for path in (dataset.parent / "images" / ".flux_cache").rglob("*")
        if path.is_file()
    }
    assert cached
    assert_succeeded(answer(*usual(tiny_models, dataset, tmp_path / "third", *on_disk)))
    again = {
        path.name: path.stat().st_mtime_ns
        for path in (dataset.parent / "images" / ".flux_cache").rglob("*")
        if path.is_file()
    }
    assert again == cached, "nothing was encoded again"
    assert_succeeded(answer(*usual(tiny_models, dataset, tmp_path / "memory")))
    first = load_file(tmp_path / "first" / "lora.safetensors")
    for name in ("second", "third", "memory"):
        other = load_file(tmp_path / name / "lora.safetensors")
        for key, tensor in first.items():
            torch.testing.assert_close(tensor, other[key], atol=1e-6, rtol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_schnell_trains_in_half_precision_with_accumulation_and_a_schedule(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path, precision: str
) -> None:
    arguments = usual(tiny_models, dataset, tmp_path)[len(tiny_models.arguments()) :]
    finished = answer(
        *tiny_models.arguments(schnell=True),
        *arguments,
        f"--mixed_precision={precision}",
        "--gradient_accumulation_steps=2",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=1",
        "--max_train_steps=4",
        "--save_every_n_steps=1",
        "--save_last_n_steps=1",
        "--save_precision=bf16",
    )
    assert_succeeded(finished)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["lora-step00000003.safetensors", "lora-step00000004.safetensors", "lora.safetensors"]
    header = read_header(tmp_path / "lora.safetensors")
    assert header.metadata["modelspec.architecture"] == "flux-1-schnell/lora"
    assert {info.dtype for key, info in header.tensors.items() if key.endswith("weight")} == {"BF16"}


def test_uncached_training_with_clip_lora_learns_and_repeats(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    """Encoders and autoencoder in every step; the same seed gives the same file, whatever the process did before."""
    arguments = [
        argument
        for argument in usual(tiny_models, dataset, tmp_path)
        if argument not in ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")
        and not argument.startswith("--output_dir")
    ]
    assert_succeeded(train(*arguments, f"--output_dir={tmp_path / 'first'}"))
    assert_succeeded(answer(*arguments, f"--output_dir={tmp_path / 'second'}"))
    first, second = (load_file(tmp_path / name / "lora.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_missing_captions_are_one_warning_that_counts_and_names_them(tiny_models: TinyModels, tmp_path: Path) -> None:
    config = make_tiny_dataset(tmp_path, count=3)
    for caption in sorted((tmp_path / "images").glob("*.txt"))[:2]:
        caption.unlink()
    pictures = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    finished = answer(*usual(tiny_models, config, tmp_path / "out"))
    assert_succeeded(finished)
    (line,) = [line for line in finished.output.splitlines() if "caption" in line.lower() and "WARNING" in line]
    assert "2" in line
    assert pictures[0] in line
    assert pictures[1] in line
