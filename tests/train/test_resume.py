"""Stopping and resuming: the same weights, losses and files, bit for bit, as a run that nobody interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.schema.cli import parse_command_line
from trainer.train.recipe import train
from trainer.train.reporting import Reporter, StopRequested

NOT_REPEATABLE = {"ss_training_finished_at", "modelspec.date", "ss_session_id", "ss_training_started_at"}


class Witness(Reporter):
    """Writes down what is logged of each step, and asks for a stop after so many micro-steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(is_main=False)
        self.logged: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        self._polls_left = stop_after

    def step(self, *, step: int, scalars: Any, **fields: object) -> None:
        self.logged[step] = dict(scalars)
        super().step(step=step, scalars=scalars, **fields)

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warning(self, text: str) -> None:
        self.lines.append(text)

    def should_stop(self) -> bool:
        if self._phase == "training" and self._polls_left is not None:
            self._polls_left -= 1
            if self._polls_left < 0:
                self._stop.set()
        return super().should_stop()


def words(models: TinyModels, dataset: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={output_dir}",
        "--output_name=x",
        "--device=cpu",
        "--seed=5",
        "--network_train_unet_only",
        "--t5xxl_max_token_length=16",
        "--model_prediction_type=raw",
        "--learning_rate=1e-2",
        *more,
    ]


def run(arguments: Sequence[str], stop_after: int | None = None) -> Witness:
    witness = Witness(stop_after)
    if stop_after is None:
        train(parse_command_line(arguments), witness)
    else:
        with pytest.raises(StopRequested):
            train(parse_command_line(arguments), witness)
    return witness


def same_file(path: Path, other: Path) -> bool:
    """Whether two LoRA files hold the same tensors and say the same, the moment of saving apart."""
    ours, theirs = load_file(path), load_file(other)
    with safe_open(path, "pt") as one, safe_open(other, "pt") as two:
        said, also_said = dict(one.metadata()), dict(two.metadata())
    differing = {key for key in said.keys() | also_said.keys() if said.get(key) != also_said.get(key)}
    same_tensors = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return same_tensors and differing <= NOT_REPEATABLE


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


LIVE = (
    "--network_dim=4",
    "--network_dropout=0.1",
    "--network_args",
    "rank_dropout=0.2",
    "--shuffle_caption",
    "--caption_dropout_rate=0.3",
    "--flip_aug",
    "--random_crop",
    "--blocks_to_swap=2",
    "--gradient_checkpointing",
    "--lr_scheduler=cosine",
    "--scale_weight_norms=0.5",
)
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")


@pytest.mark.parametrize(
    "settings",
    [
        LIVE,
        (*CACHED, "--network_dim=32", "--optimizer_type=AdamW8bit", "--mixed_precision=bf16"),
        (*CACHED, "--network_args", "pissa=True"),
        (*CACHED, "--network_args", "ggpo_sigma=0.03", "ggpo_beta=0.01", "--mixed_precision=fp16"),
        (*CACHED, "--network_module=networks.oft_flux", "--network_dim=4", "--network_alpha=0.001"),
    ],
    ids=["live", "8bit", "pissa", "ggpo-fp16", "oft"],
)
def test_a_run_stopped_amid_an_accumulation_goes_on_to_the_same_bits(
    tiny_models: TinyModels, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    if any("8bit" in word for word in settings):
        pytest.importorskip("bitsandbytes")
    dataset = make_tiny_dataset(tmp_path / "data", count=5)
    # Five batches make steps of 2, 2 and 1 micro-steps: step 5 is the second one of the second epoch.
    course = ("--gradient_accumulation_steps=2", "--max_train_epochs=3", "--save_every_n_steps=4", *settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = run(words(tiny_models, dataset, whole, *course))
    stopped = run(words(tiny_models, dataset, parts, *course, "--save_state"), stop_after=8)
    assert sorted(stopped.logged) == [1, 2, 3, 4], "the fifth step was cut off after its first micro-step"
    state = parts / "x-step00000004-state"
    assert names(state) == {
        "state.json", "train_state.json", "network.safetensors", "optimizer.safetensors", "random.safetensors",
    }  # fmt: skip
    assert json.loads((state / "train_state.json").read_text()) == {"current_epoch": 2, "current_step": 4}
    resumed = run(words(tiny_models, dataset, parts, *course, f"--resume={state}"))
    assert {**stopped.logged, **resumed.logged} == uninterrupted.logged
    assert sorted(resumed.logged) == [5, 6, 7, 8, 9]
    files = {name for name in names(whole) if name.endswith(".safetensors")}
    assert files == {"x.safetensors", "x-step00000004.safetensors", "x-step00000008.safetensors"}
    assert files == {name for name in names(parts) if name.endswith(".safetensors")}
    assert all(same_file(whole / name, parts / name) for name in files)
    sessions = {safe_open(parts / name, "pt").metadata()["ss_session_id"] for name in files}
    assert len(sessions) == 1, "a resumed run is still the same one"
