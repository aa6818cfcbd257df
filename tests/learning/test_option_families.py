"""Each family of options still learns: a short training on the emblem with it, held to the same assertion. On request.

To add a family, add a line to `FAMILIES`: its name and the options that choose it. Options given here win over the demo's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.learning.demo_run import (
    assert_emblem_learned,
    assert_loss_fell,
    emblem_pictures,
    measure,
    subset_toml,
    train_short,
)
from trainer.schema.folders import demo_dir
from trainer.tools.demo_pictures import other_folder
from trainer.tools.tiny_models import make_demo_bundle

pytestmark = [pytest.mark.learning_slow, pytest.mark.slow, pytest.mark.timeout(900)]

LEAST = 0.35
"""Part of the captions whose pictures show the emblem, before the right background. Without any of the options: 0.65."""


@dataclass(frozen=True)
class Family:
    """Options that come after the demo's own and win over them, and flags of the demo's own that are left out."""

    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    is_drawn: bool = True
    """Whether the emblem is drawn after so short a training; the loss has to fall in any case."""


FAMILIES: Final = {
    "fp8 storage": Family(("--fp8_base",)),
    "nf4 storage": Family(("--base_storage=nf4",)),
    "block swap": Family(("--blocks_to_swap=3",)),
    "gradient checkpointing": Family(("--gradient_checkpointing",)),
    "gradient accumulation": Family(("--gradient_accumulation_steps=2",), is_drawn=False),
    "split qkv": Family(("--network_args", "split_qkv=True")),
    "OFT": Family(("--network_module=networks.oft_flux", "--network_dim=4", "--network_alpha=1e-2"), is_drawn=False),
    "DoRA": Family(("--network_args", "dora=True")),
    "LoRA+": Family(("--network_args", "loraplus_lr_ratio=4", "--learning_rate=1e-3"), is_drawn=False),
    "single blocks only": Family(("--network_args", "train_blocks=single"), is_drawn=False),
    "dropout": Family(("--network_dropout=0.1",)),
    "text encoder LoRA": Family(without=("--network_train_unet_only", "--cache_text_encoder_outputs")),
    "latents without a cache": Family(without=("--cache_latents",)),
    "huber loss": Family(("--loss_type=huber", "--huber_schedule=constant"), is_drawn=False),
    "sigmoid timesteps": Family(("--timestep_sampling=sigmoid",), is_drawn=False),
    "Adafactor": Family(("--optimizer_type=Adafactor",), is_drawn=False),
    "schedule-free": Family(("--optimizer_type=AdamWScheduleFree", "--lr_scheduler=constant")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_emblem_is_learned(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    learned = measure(train_short(tmp_path, *chosen.options, without=chosen.without))
    assert_loss_fell(learned)
    if chosen.is_drawn:
        assert_emblem_learned(learned.emblem, at_least=LEAST)


def test_the_emblem_is_learned_beside_regularisation_pictures(tmp_path: Path) -> None:
    others = other_folder(make_demo_bundle(demo_dir()).images)
    subsets = subset_toml(emblem_pictures()) + subset_toml(others, "is_reg = true", num_repeats=1)
    assert_loss_fell(measure(train_short(tmp_path, subsets=subsets)))
