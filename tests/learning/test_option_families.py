"""Each family of options still learns: the demo's training with it, held to the same measure. Runs on request.

To add a family, add a line to `FAMILIES`: its name and the options that choose it. Options given here win over the demo's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.learning.demo_run import run_demo

pytestmark = [pytest.mark.learning_slow, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Family:
    """Options that come after the demo's own and win over them, and flags of the demo's own that are left out."""

    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


FAMILIES: Final = {
    "block swap": Family(("--blocks_to_swap=3",)),
    "bf16 and gradient checkpointing": Family(("--mixed_precision=bf16", "--gradient_checkpointing")),
    "gradient accumulation": Family(("--gradient_accumulation_steps=2", "--learning_rate=4e-3")),
    "single blocks only": Family(("--network_args", "train_blocks=single")),
    "double blocks only": Family(("--network_args", "train_blocks=double", "--learning_rate=4e-3")),
    "dropout": Family(("--network_dropout=0.1",)),
    "text encoder LoRA": Family(without=("--network_train_unet_only", "--cache_text_encoder_outputs")),
    "latents without a cache": Family(without=("--cache_latents",)),
    "text without a cache": Family(without=("--cache_text_encoder_outputs",)),
    "huber loss": Family(("--loss_type=huber", "--huber_schedule=constant")),
    "sigmoid timesteps": Family(("--timestep_sampling=sigmoid",)),
    "8 bit AdamW": Family(("--optimizer_type=AdamW8bit",)),
    "Adafactor": Family(("--optimizer_type=Adafactor",)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_emblem_is_learned(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    run = run_demo(tmp_path, *chosen.options, without=chosen.without, num_pictures=12)
    assert run.before.emblem < 0.1
    assert run.after.emblem > 0.7
    assert run.after.others >= run.before.others - 0.2
