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
    assert_loss_fell,
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

LEAST = 0.25
"""Part of the captions whose pictures show the emblem, before the right background. Seen without any of the options: 0.72."""

BAR: Final = 16
"""Rows of the bar below the pictures of the training with masks, of which nothing is to be learned."""


@dataclass(frozen=True)
class Family:
    """Options that come after the demo's own and win over them, and flags of the demo's own that are left out."""

    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    is_drawn: bool = True
    """Whether the emblem is drawn after so short a training."""
    loss_to: float = 0.45
    """What the loss has to fall to in any case, as a part of the base's."""


# Behind the slower ones, what was seen: the part of the pictures with the emblem, and the loss. The others reach 0.5 to
# 0.78, and 0.32 to 0.34.
FAMILIES: Final = {
    "fp8 storage": Family(("--fp8_base",)),
    "nf4 storage": Family(("--base_storage=nf4",)),
    "block swap": Family(("--blocks_to_swap=3",)),
    "gradient checkpointing": Family(("--gradient_checkpointing",)),
    "gradient accumulation": Family(("--gradient_accumulation_steps=2",)),  # 0.44, 0.34
    "split qkv": Family(("--network_args", "split_qkv=True")),
    "OFT": Family(
        (
            *("--network_module=networks.oft_flux", "--network_dim=2", "--network_alpha=1e-3"),
            *("--network_args", "enable_all_linear=True", "--learning_rate=3e-3", "--max_train_epochs=8"),
        )
    ),
    "DoRA": Family(("--network_args", "dora=True")),
    "LoRA+": Family(("--network_args", "loraplus_lr_ratio=4", "--learning_rate=1e-3")),
    "single blocks only": Family(("--network_args", "train_blocks=single"), is_drawn=False, loss_to=0.5),  # 0.03, 0.39
    "dropout": Family(("--network_dropout=0.1",)),
    "text encoder LoRA": Family(
        without=("--network_train_unet_only", "--cache_text_encoder_outputs"), loss_to=0.55
    ),  # 0.5, 0.43
    "latents without a cache": Family(without=("--cache_latents",)),
    "huber loss": Family(("--loss_type=huber", "--huber_schedule=constant")),
    "sigmoid timesteps": Family(("--timestep_sampling=sigmoid",), is_drawn=False),  # 0.28, 0.32
    "Adafactor": Family(
        (
            "--optimizer_type=Adafactor",
            "--optimizer_args",
            "relative_step=False",
            "scale_parameter=False",
            "warmup_init=False",
        )
    ),
    "schedule-free": Family(("--optimizer_type=AdamWScheduleFree", "--lr_scheduler=constant")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_emblem_is_learned(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    learned = measure(train_short(tmp_path, *chosen.options, without=chosen.without))
    assert_loss_fell(learned, to=chosen.loss_to)
    if chosen.is_drawn:
        assert_emblem_learned(learned.emblem, at_least=LEAST)


def test_the_emblem_is_learned_beside_regularisation_pictures(tmp_path: Path) -> None:
    others = other_folder(make_demo_bundle(demo_dir()).images)
    subsets = subset_toml(emblem_pictures()) + subset_toml(others, "is_reg = true", num_repeats=1)
    learned = measure(train_short(tmp_path, subsets=subsets))
    assert_loss_fell(learned)
    assert_emblem_learned(learned.emblem, at_least=LEAST)


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
    learned = measure(masked)  # seen: the emblem in 0.56 of the pictures, the loss 0.38
    assert_loss_fell(learned, to=0.5)
    assert_emblem_learned(learned.emblem, at_least=LEAST)
