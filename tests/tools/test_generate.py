"""The command that makes pictures, on the tiny models: what a strength does, and that one load serves a whole grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.lora.random_lora import random_lora
from tests.model.test_scaled_fp8 import scaled_file
from tests.runs.in_process import answer
from tests.tiny import TinyModels
from trainer.lora.forms import converted
from trainer.schema.job_folder import JobFolder
from trainer.train.checkpoint import save_lora
from trainer.train.generate import plan_pictures
from trainer.train.sample_prompts import SamplePrompt

SMALL = ("--width=64", "--height=64", "--steps=2", "--seed=5", "--mixed_precision=no", "--device=cpu")
FLUX_LAYERS = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_1_linear2")
CLIP_LAYER = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture
def lora(tmp_path: Path, tiny_models: TinyModels) -> Path:
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(tiny_models.flux_dev, "pt") as file:
        hidden = file.get_slice("img_in.weight").get_shape()[0]
    path = tmp_path / "lora.safetensors"
    save_lora(path, random_lora(hidden=hidden, names=FLUX_LAYERS, alpha=4.0), {})
    return path


def pictures_of(folder: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def test_strength_0_is_the_base_model_to_the_last_bit_and_strengths_differ(
    tiny_models: TinyModels, lora: Path, tmp_path: Path
) -> None:
    base, grid = tmp_path / "base", tmp_path / "grid"
    words = ("generate", *tiny_models.arguments(), *SMALL, "--prompt=a cat")
    done = answer(*words, f"--output_dir={base}")
    assert done.code == 0, done.output
    done = answer(*words, f"--output_dir={grid}", f"--checkpoints={lora}", "--strengths", "0", "0.5", "1")
    assert done.code == 0, done.output
    alone, (zero, half, whole) = list(pictures_of(base).values()), pictures_of(grid).values()
    assert alone == [zero]
    assert len({zero, half, whole}) == 3


def test_a_lora_of_another_form_gives_the_same_picture_and_progress_goes_to_the_job(
    tiny_models: TinyModels, lora: Path, tmp_path: Path
) -> None:
    from trainer.lora.lora_file import read_lora_file  # noqa: PLC0415

    other = tmp_path / "diffusers.safetensors"
    state, metadata, _ = converted(*read_lora_file(lora), "diffusers")
    save_lora(other, state, metadata)
    job = JobFolder(tmp_path / "job")
    job.output_dir.mkdir(parents=True)
    done = answer(
        "generate",
        *tiny_models.arguments(),
        *SMALL,
        "--prompt=a cat",
        f"--checkpoints={lora}",
        f"--checkpoints={other}",
        "--blocks_to_swap=1",
        f"--output_dir={job.output_dir}",
        f"--job_dir={job.path}",
    )
    assert done.code == 0, done.output
    first, second = (Image.open(path).convert("RGB") for path in sorted(job.output_dir.glob("*.png")))
    assert max(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True)) <= 1
    events = [json.loads(line) for line in job.events_jsonl.read_text().splitlines()]
    results = [event for event in events if event["kind"] == "result"]
    assert [result["cells"][0]["checkpoint"] for result in results] == [0, 1]
    assert results[0]["path"].startswith("output/")
    assert events[-1]["kind"] == "finished"
    assert any(event["kind"] == "progress" and event["total"] == 4 for event in events)


def test_an_fp8_file_gives_the_picture_of_its_expanded_weights(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = scaled_file(tiny_models.flux_dev, tmp_path / "fp8.safetensors", "older")
    pictures: list[dict[str, bytes]] = []
    for name, words in (("kept", ()), ("expanded", ("--base_storage=compute",)), ("int8", ("--base_storage=int8",))):
        words = (*tiny_models.arguments(), *SMALL, f"--pretrained_model_name_or_path={path}", "--prompt=a cat", *words)
        done = answer("generate", *words, f"--output_dir={tmp_path / name}")
        assert done.code == 0, done.output
        pictures.append(pictures_of(tmp_path / name))
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_same_picture_is_planned_once() -> None:
    planned = plan_pictures([SamplePrompt("a"), SamplePrompt("b", seed=9)], [1, 2], [], [0, 1], [0.0, 1.0])
    # Two seeds for the first prompt, one for the second: the base once, and each checkpoint.
    assert len(planned) == 3 * (1 + 2)
    assert sum(len(picture.cells) for picture in planned) == 3 * 4
    assert {picture.seed for picture in planned if picture.prompt_index == 1} == {9}


def test_a_lora_on_the_text_encoder_changes_the_picture_too(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_lora(path, random_lora(hidden=32, names=(CLIP_LAYER,), alpha=40.0), {})
    words = ("generate", *tiny_models.arguments(), *SMALL, "--prompt=a cat", f"--output_dir={tmp_path / 'out'}")
    done = answer(*words, f"--lora={path}:2", "--strengths", "0", "1")
    assert done.code == 0, done.output
    assert len(set(pictures_of(tmp_path / "out").values())) == 2


def test_what_is_wrong_is_told_before_anything_is_loaded(tiny_models: TinyModels, tmp_path: Path) -> None:
    words = ("generate", *tiny_models.arguments(), *SMALL, f"--output_dir={tmp_path}")
    assert answer(*words).code == 2
    missing = answer(*words, "--prompt=x", f"--lora={tmp_path / 'no.safetensors'}", "--ae=nowhere")
    assert missing.code != 0
    assert "no.safetensors" in missing.output
    assert "nowhere" in missing.output
    wrong = tmp_path / "wrong.safetensors"
    save_lora(wrong, random_lora(hidden=8, names=FLUX_LAYERS), {})
    refused = answer(*words, "--prompt=x", f"--lora={wrong}")
    assert refused.code == 3
    assert "another model" in refused.output
    assert torch.is_grad_enabled()
