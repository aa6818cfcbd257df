"""Trainings that are broken on purpose: the measures have to tell them from one that works. Runs on request."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import Tensor

from tests.learning.demo_run import NUM_PICTURES, Learned, is_learned, measure, train_demo
from trainer.schema.folders import demo_dir
from trainer.tools.demo_measure import Accuracy, base_accuracy
from trainer.tools.demo_pictures import demo_dataset_toml, emblem_folder
from trainer.tools.tiny_models import TRAINED_FILES, make_demo_bundle
from trainer.tools.train_demo_models import load_painter
from trainer.train import flow

pytestmark = [pytest.mark.learning_slow, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def base() -> Accuracy:
    return base_accuracy(load_painter(TRAINED_FILES), NUM_PICTURES)


def learned(got: Learned, base: Accuracy) -> bool:
    return is_learned(got.emblem, got.others, base)


def test_a_whole_training_is_seen_to_learn(base: Accuracy, tmp_path: Path) -> None:
    """The control of the controls: the same way without anything broken."""
    got = measure(train_demo(tmp_path))
    assert learned(got, base), got


def test_a_target_of_the_wrong_sign_is_seen(base: Accuracy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(latents: Tensor, noise: Tensor) -> Tensor:
        return latents - noise

    monkeypatch.setattr(flow, "velocity_target", wrong)
    got = measure(train_demo(tmp_path))
    assert not learned(got, base)
    assert got.emblem.shown < 0.1, got


def test_a_lora_of_scale_0_is_seen(base: Accuracy, tmp_path: Path) -> None:
    got = measure(train_demo(tmp_path, "--network_alpha=1e-9"))
    assert not learned(got, base)
    assert got.emblem.shown < 0.1, got


def test_captions_of_other_pictures_are_seen(base: Accuracy, tmp_path: Path) -> None:
    """Each picture of the emblem has the caption of another one: of one elsewhere, before another background."""
    images = tmp_path / "images"
    shutil.copytree(make_demo_bundle(demo_dir()).images, images)
    captions = sorted(emblem_folder(images).glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in captions]
    for index, path in enumerate(captions):
        path.write_text(texts[(index + len(texts) // 2) % len(texts)], encoding="utf-8")
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(demo_dataset_toml(images), encoding="utf-8")
    got = measure(train_demo(tmp_path, dataset=dataset))
    assert not learned(got, base)
    assert got.emblem.as_captioned < 0.5, got
