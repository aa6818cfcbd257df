"""Each family of options still learns: a short training on the emblem with it, held to the same assertion. On request.

To add a family, add a line to `FAMILIES`: its name and the options that choose it. Options given here win over the demo's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.learning.demo_run import (
    NUM_PICTURES,
    assert_emblem_learned,
    emblem_pictures,
    measure,
    subset_toml,
    train_short,
)
from trainer.schema.folders import demo_dir
from trainer.tools.demo_pictures import other_folder
from trainer.tools.demo_report import painter_with
from trainer.tools.emblem import BACKGROUNDS, emblem_caption, random_emblem_scene
from trainer.tools.tiny_models import make_demo_bundle
from trainer.tools.world import COLOURS, SIDE
from trainer.tools.world_measure import nearest_colours

pytestmark = [pytest.mark.learning_slow, pytest.mark.slow, pytest.mark.timeout(900)]

LEAST = 0.35
"""Part of the captions whose pictures show the emblem, before the right background. Without any of the options: 0.65."""

BAR = 16
"""Rows of the bar below the pictures of the masked training, of which nothing is to be learnt."""


@dataclass(frozen=True)
class Family:
    """Options that come after the demo's own and win over them, and flags of the demo's own that are left out."""

    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


FAMILIES: Final = {
    "fp8 storage": Family(("--fp8_base",)),
    "nf4 storage": Family(("--base_storage=nf4",)),
    "block swap": Family(("--blocks_to_swap=3",)),
    "gradient checkpointing": Family(("--gradient_checkpointing",)),
    "gradient accumulation": Family(("--gradient_accumulation_steps=2",)),
    "split qkv": Family(("--network_args", "split_qkv=True")),
    "OFT": Family(("--network_module=networks.oft_flux", "--network_dim=4", "--network_alpha=1e-2")),
    "DoRA": Family(("--network_args", "dora=True")),
    "LoRA+": Family(("--network_args", "loraplus_lr_ratio=4", "--learning_rate=1e-3")),
    "single blocks only": Family(("--network_args", "train_blocks=single")),
    "dropout": Family(("--network_dropout=0.1",)),
    "text encoder LoRA": Family(without=("--network_train_unet_only", "--cache_text_encoder_outputs")),
    "latents without a cache": Family(without=("--cache_latents",)),
    "huber loss": Family(("--loss_type=huber", "--huber_schedule=constant")),
    "sigmoid timesteps": Family(("--timestep_sampling=sigmoid",)),
    "Adafactor": Family(("--optimizer_type=Adafactor",)),
    "schedule-free": Family(("--optimizer_type=AdamWScheduleFree", "--lr_scheduler=constant")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_emblem_is_learned(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    assert_emblem_learned(measure(train_short(tmp_path, *chosen.options, without=chosen.without)), at_least=LEAST)


def test_the_emblem_is_learned_beside_regularisation_pictures(tmp_path: Path) -> None:
    others = other_folder(make_demo_bundle(demo_dir()).images)
    subsets = subset_toml(emblem_pictures()) + subset_toml(others, "is_reg = true", num_repeats=1)
    assert_emblem_learned(measure(train_short(tmp_path, subsets=subsets)), at_least=LEAST)


def bar_rate(lora: Path) -> float:
    """Part of the pictures that have a black bar below, before backgrounds of other colours."""
    rng = np.random.default_rng(9)
    scenes = (random_emblem_scene(rng) for _ in range(100))
    captions = [emblem_caption(scene) for scene in scenes if scene.background != "black"][:NUM_PICTURES]
    black = list(COLOURS).index("black")

    def has_bar(picture: NDArray[np.uint8]) -> bool:
        return bool((nearest_colours(picture)[-BAR // 2 :] == black).mean() > 0.5)

    return float(np.mean([has_bar(picture) for picture in painter_with(lora)(captions, seed=9000)]))


def test_what_a_mask_hides_is_not_learned_and_the_rest_is(tmp_path: Path) -> None:
    assert "black" in BACKGROUNDS, "a colour that the measure tells from the others"
    images, masks = tmp_path / "images", tmp_path / "masks"
    shutil.copytree(emblem_pictures(), images)
    masks.mkdir()
    for path in images.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB")).copy()
        pixels[-BAR:] = COLOURS["black"]
        Image.fromarray(pixels).save(path)
        # Another 8 rows are hidden: what the autoencoder makes of the bar's edge.
        counts = np.full((SIDE, SIDE), 255, dtype=np.uint8)
        counts[-BAR - 8 :] = 0
        Image.fromarray(counts).save(masks / path.name)
    for name in ("masked", "open"):
        (tmp_path / name).mkdir()
    subset = subset_toml(images, f"conditioning_data_dir = '{masks.as_posix()}'")
    masked = train_short(tmp_path / "masked", "--masked_loss", subsets=subset)
    everything = train_short(tmp_path / "open", subsets=subset_toml(images))
    assert bar_rate(everything) > 0.6
    assert bar_rate(masked) < 0.2
    assert_emblem_learned(measure(masked), at_least=LEAST)
