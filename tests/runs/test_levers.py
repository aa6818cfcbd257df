"""Trainings with every lever of memory at once, beside samples, validation and accumulation: the LoRA of a plain run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs.in_process import answer, small_run, words_of
from tests.runs.test_stored_base import dataset, train
from tests.tiny import TinyModels

pytestmark = pytest.mark.timeout(300)
__all__ = ["dataset"]

LEVERS = ("--blocks_to_swap=2", "--gradient_checkpointing", "--checkpoint_blocks=3", "--offload_modulation=file")


@pytest.mark.parametrize("storage", [(), ("--base_storage=fp8",)])
def test_all_levers_at_once_change_no_bit(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path, storage: tuple[str, ...]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    usual = (
        *("--mixed_precision=bf16", "--learning_rate=1e-2", "--max_train_steps=2", "--gradient_accumulation_steps=2"),
        *("--validation_split=0.25", "--validate_every_n_steps=1", "--apply_t5_attn_mask"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=1", *storage),
    )
    plain, _ = train(tiny_models, dataset, tmp_path / "plain", *usual)
    levers, output = train(tiny_models, dataset, tmp_path / "levers", *usual, *LEVERS)
    assert "modulation weights are in main memory" not in output, "the file has them in bf16"
    assert len(list((tmp_path / "levers" / "sample").glob("*.png"))) == 2
    assert all(torch.equal(tensor, levers[key]) for key, tensor in plain.items())


def test_a_compiled_run_learns_the_same_but_for_rounding(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path
) -> None:
    usual = ("--learning_rate=1e-3", "--max_train_steps=2")
    plain, _ = train(tiny_models, dataset, tmp_path / "plain", *usual)
    more = ("--torch_compile", "--dynamo_backend=eager", "--gradient_checkpointing", "--blocks_to_swap=2")
    compiled, output = train(tiny_models, dataset, tmp_path / "compiled", *usual, *more)
    assert "compile the blocks with eager" in output
    for key, tensor in plain.items():
        torch.testing.assert_close(compiled[key], tensor, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (("--torch_compile", "--blocks_to_swap=2"), "swapped blocks leave before it"),
        (
            ("--torch_compile", "--blocks_to_swap=auto", "--gradient_checkpointing", "--checkpoint_blocks=2"),
            "swapped blocks leave before it",
        ),
        (("--dynamo_backend=cudagraphs", "--torch_compile"), "cudagraphs cannot compile"),
        (("--offload_modulation=file", "--base_weights=other.safetensors"), "base_weights are not merged"),
        (("--offload_modulation=host", "--network_module=lycoris.kohya"), "must be on the device"),
    ],
)
def test_what_cannot_stand_together_is_refused_before_anything_loads(
    tiny_models: TinyModels, dataset: Path, tmp_path: Path, given: tuple[str, ...], what: str
) -> None:
    words = small_run(tiny_models, dataset, tmp_path / "output")
    if any(word.startswith("--network_module") for word in given):
        del words["network_module"]
    found = answer(*words_of(words), *given)
    assert found.code == 2
    assert what in " ".join(found.output.split())


def test_a_lever_without_effect_says_so(tiny_models: TinyModels, dataset: Path, tmp_path: Path) -> None:
    words = words_of(small_run(tiny_models, dataset, tmp_path / "output"))
    more = ("--checkpoint_blocks=2", "--cpu_offload_checkpointing", "--dynamo_backend=eager")
    output = answer(*words, *more).output
    for line in (
        "checkpoint_blocks has no effect: gradient_checkpointing is off",
        "cpu_offload_checkpointing has no effect: gradient_checkpointing is off",
        "dynamo_backend has no effect: torch_compile is not given",
    ):
        assert line in output
