"""Trainings on a base that is stored in fewer bits, with all that a run may do beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model.test_scaled_fp8 import scaled_file
from tests.runs.in_process import answer, small_run, words_of
from tests.tiny import TinyModels, make_images

pytestmark = pytest.mark.timeout(300)

FLUX_ONLY = ("--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs", "--seed=3")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_images(tmp_path / "images", 4)
    path = tmp_path / "dataset.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'images'}'\n", encoding="utf-8"
    )
    return path


def train(models: TinyModels, dataset: Path, output: Path, *more: str) -> tuple[dict[str, torch.Tensor], str]:
    given = small_run(models, dataset, output)
    del given["max_train_steps"]
    found = answer(*words_of(given), *FLUX_ONLY, *more)
    assert found.code == 0, found.output
    return load_file(output / "lora.safetensors"), found.output


def test_a_run_with_everything_beside_it_resumes_exactly(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    train(tiny_models, dataset, tmp_path / "base", "--max_train_steps=2", "--learning_rate=1e-2")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    hard = (
        *("--base_storage=nf4", "--blocks_to_swap=3", "--gradient_checkpointing", "--validation_split=0.25"),
        *("--validate_every_n_steps=2", f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--save_state"),
        *("--save_every_n_steps=2", "--learning_rate=1e-3", "--max_train_steps=4"),
        f"--base_weights={tmp_path / 'base' / 'lora.safetensors'}",
    )
    whole, output = train(tiny_models, dataset, tmp_path / "whole", *hard)
    assert "merged " in output
    assert len(list((tmp_path / "whole" / "sample").glob("*.png"))) == 2
    state = tmp_path / "whole" / "lora-step00000002-state"
    rest, _ = train(tiny_models, dataset, tmp_path / "rest", *hard, f"--resume={state}")
    assert whole.keys() == rest.keys()
    assert all(torch.equal(tensor, rest[key]) for key, tensor in whole.items())
    # Where the blocks are kept changes nothing.
    plain = [word for word in hard if not word.startswith(("--blocks_to_swap", "--gradient_checkpointing"))]
    unswapped, _ = train(tiny_models, dataset, tmp_path / "unswapped", *plain)
    assert all(torch.equal(tensor, unswapped[key]) for key, tensor in whole.items())


def test_a_file_in_fp8_trains_as_it_is_to_the_same_lora(tiny_models: TinyModels, dataset: Path, tmp_path: Path) -> None:
    path = scaled_file(tiny_models.flux_dev, tmp_path / "fp8.safetensors", "older")
    more = (f"--pretrained_model_name_or_path={path}", "--max_train_steps=2", "--learning_rate=1e-2")
    expanded, output = train(tiny_models, dataset, tmp_path / "expanded", *more, "--base_storage=compute")
    assert "is kept so" not in output
    for name, words in (("kept", ()), ("swapped", ("--blocks_to_swap=2", "--gradient_checkpointing"))):
        kept, output = train(tiny_models, dataset, tmp_path / name, *more, *words)
        assert "the model's file is fp8 and is kept so" in output
        assert all(torch.equal(tensor, kept[key]) for key, tensor in expanded.items())
    base = tmp_path / "kept" / "lora.safetensors"
    _, output = train(tiny_models, dataset, tmp_path / "merged", *more, f"--base_weights={base}")
    assert "fp8 file is expanded to twice its size: base_weights are merged into it" in output


@pytest.mark.parametrize(
    "words",
    [
        ("--fp8_base",),
        ("--base_storage=int8",),
        ("--base_storage=nf4",),
        ("--fp8_base", "--mixed_precision=fp16", "--blocks_to_swap=2"),
    ],
)
def test_a_replay_is_near_that_on_whole_weights(golden: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    source = golden / "replay" / "t2_default_nonzero.safetensors"
    facts = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    output = tmp_path / "out.safetensors"
    found = answer(
        "replay",
        *(f"--input={source}", f"--output={output}", "--steps", "3", "--device=cpu"),
        f"--pretrained_model_name_or_path={golden / 'replay' / 'model_dev.safetensors'}",
        *facts["options"],
        *("--network_dim=4", "--learning_rate=1e-3", "--max_grad_norm=0"),
        *words,
    )
    assert found.code == 0, found.output
    losses = load_file(output)["losses"].tolist()
    assert losses == pytest.approx(facts["losses"][:3], rel=0.1)
    assert losses != pytest.approx(facts["losses"][:3], rel=1e-6), "the weights are stored in fewer bits"


def test_a_network_that_reads_the_weights_itself_is_refused(tiny_models: TinyModels, dataset: Path) -> None:
    given = small_run(tiny_models, dataset, dataset.parent / "out") | {"network_module": "lycoris.kohya"}
    found = answer(*words_of(given), "--fp8_base")
    assert found.code == 2
    assert any("fp8_base stores in fewer bits" in line for line in found.problems), found.output
