"""One real run that is watched from all sides: validation, edited prompts, curves, uploads, a schedule-free optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.schema.checkpoint_header import read_header
from trainer.schema.cli import parse_command_line
from trainer.train.recipe import train
from trainer.train.reporting import Reporter

TOKEN = "hf_secret"


class Witness(Reporter):
    """Writes down what it is told, and does something after each step."""

    def __init__(self, after_step: Callable[[int], None]) -> None:
        super().__init__()
        self.told: list[str] = []
        self.samples: list[tuple[int, str]] = []
        self.validated: list[tuple[int, float]] = []
        self._after_step = after_step

    def step(self, *, step: int, scalars: Any, **fields: object) -> None:
        super().step(step=step, scalars=scalars, **fields)
        self._after_step(step)

    def note(self, text: str) -> None:
        super().note(text)
        self.told.append(text)

    def warning(self, text: str) -> None:
        super().warning(text)
        self.told.append(text)

    def sample(self, path: Path, *, step: int, epoch: int, prompt: str, index: int, seed: int) -> None:
        super().sample(path, step=step, epoch=epoch, prompt=prompt, index=index, seed=seed)
        self.samples.append((step, prompt))

    def validation(self, *, step: int, epoch: int, loss: float, train_loss: float, is_epoch_end: bool) -> None:
        super().validation(step=step, epoch=epoch, loss=loss, train_loss=train_loss, is_epoch_end=is_epoch_end)
        self.validated.append((step, loss))


class FakeHub:
    """The calls of `huggingface_hub.HfApi` that are used."""

    uploaded: list[str]

    def __init__(self, token: str | None = None) -> None:
        assert token == TOKEN

    def create_repo(self, repo_id: str, **_: object) -> None: ...

    def upload_file(self, *, path_in_repo: str, **_: object) -> None:
        FakeHub.uploaded.append(path_in_repo)


def test_everything_that_is_asked_beside_the_training_is_done(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    FakeHub.uploaded = []
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")

    def edit(step: int) -> None:
        if step == 1:
            with prompts.open("a", encoding="utf-8") as file:
                file.write("a new prompt --w 64 --h 64 --s 1 --n bad --l 2\n")
        if step == 2:
            prompts.write_text("broken --w x\n", encoding="utf-8")

    reporter = Witness(edit)
    output = tmp_path / "out"
    words = [
        *tiny_models.arguments(),
        f"--dataset_config={make_tiny_dataset(tmp_path, count=4)}",
        f"--output_dir={output}",
        "--output_name=cat",
        "--network_train_unet_only",
        "--network_dim=2",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=16",
        "--model_prediction_type=raw",
        "--timestep_sampling=sigmoid",
        "--learning_rate=1e-2",
        "--optimizer_type=AdamWScheduleFree",
        "--blocks_to_swap=2",
        "--max_train_steps=3",
        "--seed=3",
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=1",
        "--validation_split=0.25",
        "--validate_every_n_steps=2",
        f"--logging_dir={tmp_path / 'logs'}",
        "--save_every_n_steps=2",
        "--huggingface_repo_id=me/cat",
        f"--huggingface_token={TOKEN}",
        "--async_upload",
    ]
    train(parse_command_line(words), reporter)
    reporter.close()

    assert [prompt for step, prompt in reporter.samples if step == 1] == ["a red circle", "a new prompt"]
    assert [prompt for step, prompt in reporter.samples if step == 3] == ["a red circle", "a new prompt"]
    told = "\n".join(reporter.told)
    assert told.count("2 new texts of sample prompts: the text encoders are loaded for this moment") == 1
    assert told.count("the sample prompts of before are used") == 1
    names = sorted(path.name for path in (output / "sample").glob("cat_000003_*.png"))
    assert re.fullmatch(r"cat_000003_00_\d{14}_1\.png", names[0])
    assert re.fullmatch(r"cat_000003_01_\d{14}\.png", names[1])

    # Three of four pictures are trained on: a step each, and the third ends the epoch.
    assert [step for step, _ in reporter.validated] == [2, 3]
    assert reporter.validated[0][1] != reporter.validated[1][1]
    assert read_header(output / "cat.safetensors").metadata["ss_num_validation_images"] == "1"
    assert read_header(output / "cat.safetensors").metadata["ss_validation_split"] == "0.25"

    assert FakeHub.uploaded == ["cat-step00000002.safetensors", "cat.safetensors"]
    (folder,) = (tmp_path / "logs").glob("*/network_train")
    tags = set(cast("list[str]", EventAccumulator(str(folder)).Reload().Tags()["scalars"]))
    assert {
        "loss/current",
        "loss/average",
        "loss/epoch_average",
        "loss/validation/step_average",
        "loss/validation/step_divergence",
        "loss/validation/epoch_average",
        "lr/unet",
        "lr/group0",
        "norm/avg_grad_norm",
    } <= tags
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in told
