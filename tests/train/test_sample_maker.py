"""Samples of a run: drawn in evaluation mode, whatever the training's dropouts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import TinyModels
from trainer.lora.network import LoraNetwork
from trainer.model.weights import load_autoencoder, load_flux
from trainer.schema.lora_spec import LoraSpec
from trainer.train.conditioning import TextInputs
from trainer.train.reporting import Reporter
from trainer.train.sample_maker import SampleMaker
from trainer.train.sample_prompts import SamplePrompt
from trainer.train.step_position import StepPosition


def text(captions: Sequence[str]) -> TextInputs:
    return TextInputs(torch.ones(len(captions), 3, 64), torch.ones(len(captions), 32), None)


def test_a_sample_is_drawn_without_the_loras_dropout(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    spec = LoraSpec(rank=4, alpha=4, dropout=0.5, rank_dropout=0.5, module_dropout=0.5)
    network = LoraNetwork.attach(model, None, spec, torch.Generator().manual_seed(0))
    for parameter in network.training_state().values():
        parameter.data.normal_(std=0.3)
    ae = load_autoencoder(tiny_models.ae, torch.float32, "cpu")
    maker = SampleMaker(
        lambda: [SamplePrompt("x", width=64, height=64, seed=3, num_steps=2)],
        model=model,
        network=network,
        autoencoder=lambda: ae,
        text=text,
        autocast=contextlib.nullcontext,
        autocast_in=lambda _dtype: contextlib.nullcontext(),
        device=torch.device("cpu"),
        folder=tmp_path,
        output_name="x",
        reporter=Reporter(is_main=False),
    )
    for step in (1, 2):
        network.train()
        maker(StepPosition(step, 1), False)
    first, second = (np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png")))
    assert np.array_equal(first, second)


def test_a_picture_that_fails_is_a_warning_and_the_others_are_made(
    tiny_models: TinyModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    network = LoraNetwork.attach(model, None, LoraSpec(rank=4, alpha=4), torch.Generator().manual_seed(0))
    ae = load_autoencoder(tiny_models.ae, torch.float32, "cpu")
    asked: list[str] = []
    freed: list[bool] = []

    def failing_text(captions: Sequence[str]) -> TextInputs:
        if "broken" in captions:
            raise torch.OutOfMemoryError("no room")
        return text(captions)

    prompts = [SamplePrompt(name, width=64, height=64, num_steps=1) for name in ("broken", "good")]
    maker = SampleMaker(
        lambda: prompts,
        model=model,
        network=network,
        autoencoder=lambda: ae,
        text=failing_text,
        autocast=contextlib.nullcontext,
        autocast_in=lambda _dtype: contextlib.nullcontext(),
        device=torch.device("cpu"),
        folder=tmp_path,
        output_name="x",
        reporter=Reporter(),
        prepare_texts=asked.extend,
        free_memory=lambda: freed.append(True),
    )
    with caplog.at_level("WARNING", logger="trainer"):
        maker(StepPosition(3, 1), False)
    assert asked == ["broken", "good"]
    assert freed == [True]
    (path,) = tmp_path.glob("*.png")
    assert re.fullmatch(r"x_000003_01_\d{14}\.png", path.name), "a seed that was not asked for is not in the name"
    assert [record.message for record in caplog.records] == [
        "sample 1 was not made: the device ran out of memory (no room). Make samples smaller, such as --w 512 --h 512 behind "
        "the prompt, or raise blocks_to_swap; the training goes on"
    ]
