"""Trainings that are broken on purpose: what is asserted of one that works has to fail on each of them.

All are as short as the one without a fault, which draws the emblem in two pictures of three.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import Tensor

from tests.learning.demo_run import (
    Learned,
    assert_emblem_learned,
    assert_loss_fell,
    emblem_pictures,
    measure,
    subset_toml,
    train_short,
)
from trainer.train import flow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LEAST = 0.25
"""Seen: 0.72 without a fault, 0 with each of them."""


def assert_not_drawn(learned: Learned) -> None:
    with pytest.raises(AssertionError):
        assert_emblem_learned(learned.emblem, at_least=LEAST)


def assert_loss_stayed(learned: Learned) -> None:
    with pytest.raises(AssertionError):
        assert_loss_fell(learned)


def test_without_a_fault_it_is_learned(tmp_path: Path) -> None:
    learned = measure(train_short(tmp_path))
    assert_emblem_learned(learned.emblem, at_least=LEAST)
    assert_loss_fell(learned)


def test_a_target_of_the_wrong_sign_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(latents: Tensor, noise: Tensor) -> Tensor:
        return latents - noise

    monkeypatch.setattr(flow, "velocity_target", wrong)
    learned = measure(train_short(tmp_path))
    assert_not_drawn(learned)
    assert_loss_stayed(learned)


def test_a_lora_of_scale_0_is_seen(tmp_path: Path) -> None:
    learned = measure(train_short(tmp_path, "--network_alpha=1e-9"))
    assert_not_drawn(learned)
    assert_loss_stayed(learned)


def test_captions_of_other_pictures_are_seen(tmp_path: Path) -> None:
    """Each picture has the caption of another one: of one elsewhere, before another background."""
    images = tmp_path / "images"
    shutil.copytree(emblem_pictures(), images)
    captions = sorted(images.glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in captions]
    for index, path in enumerate(captions):
        path.write_text(texts[(index + len(texts) // 2) % len(texts)], encoding="utf-8")
    assert_not_drawn(measure(train_short(tmp_path, subsets=subset_toml(images))))
