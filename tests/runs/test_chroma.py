"""Chroma through the real command, on tiny files in the real formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.runs.in_process import answer as train
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.schema.checkpoint_header import read_header
from trainer.tools.tiny_models import make_chroma

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


def command(models: TinyModels, model: Path, dataset: Path, output: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--t5xxl={models.t5xxl}",
        f"--ae={models.ae}",
        f"--t5xxl_tokenizer={models.t5xxl_tokenizer}",
        f"--dataset_config={dataset}",
        f"--output_dir={output}",
        "--output_name=chroma_lora",
        "--network_module=networks.lora_flux",
        "--network_dim=4",
        "--t5xxl_max_token_length=16",
        "--timestep_sampling=sigmoid",
        "--model_prediction_type=raw",
        "--learning_rate=1e-2",
        "--max_train_steps=3",
        "--seed=3",
        *more,
    ]


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_chroma_lora_trains_without_clip_and_makes_samples(
    tiny_models: TinyModels, tmp_path: Path, is_cached: bool
) -> None:
    dataset = make_tiny_dataset(tmp_path / "dataset", count=2)
    model = make_chroma(tmp_path / "Chroma1.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --n a very ugly blurred thing --l 4 --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    output = tmp_path / "output"
    more = ["--cache_latents", "--cache_text_encoder_outputs", "--blocks_to_swap=2", "--gradient_checkpointing"]
    finished = train(
        *command(tiny_models, model, dataset, output, "--model_type=chroma", f"--sample_prompts={prompts}"),
        "--sample_every_n_steps=3",
        *(more if is_cached else [f"--clip_l={tiny_models.clip_l}", "--mixed_precision=bf16"]),
    )
    assert finished.code == 0, finished.output
    assert "apply_t5_attn_mask is on" in finished.output
    assert "guidance_scale is 0, with which Chroma was made" in finished.output
    assert ("clip_l has no effect: Chroma has no CLIP-L" in finished.output) is not is_cached
    header = read_header(output / "chroma_lora.safetensors")
    modules = {name.partition(".")[0] for name in header.tensors}
    # Two double blocks with eight Linears each, four single blocks with two: modulation is none of them.
    assert len(modules) == 2 * 8 + 4 * 2
    assert all(name.startswith("lora_unet_") and "mod" not in name for name in modules)
    assert header.metadata["ss_base_model_version"] == "chroma"
    assert header.metadata["ss_model_type"] == "chroma"
    assert header.metadata["ss_guidance_scale"] == "0.0"
    assert header.metadata["ss_apply_t5_attn_mask"] == "True"
    assert header.metadata["modelspec.architecture"] == "chroma/lora"
    state = load_file(output / "chroma_lora.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.values())
    assert min(float(state[f"{name}.lora_up.weight"].abs().max()) for name in modules) > 0
    (sample,) = (output / "sample").glob("*.png")
    with Image.open(sample) as picture:
        assert picture.size == (64, 64)


def test_a_model_type_that_does_not_fit_the_file_is_refused_with_the_remedy(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    dataset = make_tiny_dataset(tmp_path / "dataset", count=1)
    model = make_chroma(tmp_path / "Chroma1.safetensors")
    finished = train(*command(tiny_models, model, dataset, tmp_path, f"--clip_l={tiny_models.clip_l}"))
    assert finished.code == 3, finished.output
    assert "this is a Chroma model" in finished.output
    assert "Add --model_type=chroma." in finished.output
