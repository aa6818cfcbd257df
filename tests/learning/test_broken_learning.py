"""Trainings that are broken on purpose: what is asserted of one that works has to fail on each of them.

All are as short as the one without a fault, which learns half of what the whole demo does: pictures of the emblem alone,
in small batches.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch import Tensor

from tests.learning.demo_run import assert_emblem_learned, train_demo
from trainer.schema.folders import demo_dir
from trainer.tools.demo_pictures import emblem_folder
from trainer.tools.demo_report import EmblemRate, emblem_rate, painter_with
from trainer.tools.tiny_models import make_demo_bundle
from trainer.tools.world import SIDE
from trainer.train import flow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_PICTURES = 32
LEAST = 0.35
"""Seen: 0.65 without a fault; 0 with any of them."""


def train_short(folder: Path, *options: str, images: Path | None = None) -> EmblemRate:
    """What 160 steps on the emblem come to; `images` hold its pictures and captions."""
    place = images or emblem_folder(make_demo_bundle(demo_dir()).images)
    dataset = folder / "dataset.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {SIDE}\nbatch_size = 4\ncaption_extension = '.txt'\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(place))}\nnum_repeats = 8\n",
        encoding="utf-8",
    )
    lora = train_demo(folder / "out", "--max_train_epochs=4", *options, dataset=dataset)
    return emblem_rate(painter_with(lora), NUM_PICTURES)


def assert_not_learned(emblem: EmblemRate) -> None:
    with pytest.raises(AssertionError):
        assert_emblem_learned(emblem, at_least=LEAST)


def test_without_a_fault_it_is_learned(tmp_path: Path) -> None:
    assert_emblem_learned(train_short(tmp_path), at_least=LEAST)


def test_a_target_of_the_wrong_sign_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(latents: Tensor, noise: Tensor) -> Tensor:
        return latents - noise

    monkeypatch.setattr(flow, "velocity_target", wrong)
    assert_not_learned(train_short(tmp_path))


def test_a_lora_of_scale_0_is_seen(tmp_path: Path) -> None:
    assert_not_learned(train_short(tmp_path, "--network_alpha=1e-9"))


def test_captions_of_other_pictures_are_seen(tmp_path: Path) -> None:
    """Each picture has the caption of another one: of one elsewhere, before another background."""
    images = tmp_path / "images"
    shutil.copytree(emblem_folder(make_demo_bundle(demo_dir()).images), images)
    captions = sorted(images.glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in captions]
    for index, path in enumerate(captions):
        path.write_text(texts[(index + len(texts) // 2) % len(texts)], encoding="utf-8")
    got = train_short(tmp_path, images=images)
    assert_not_learned(got)
