"""Each family of options still learns: the demo's training with it, held to the same measure. Runs on request.

To add a family, add a line to `FAMILIES`: its name and the options that choose it. Options given here win over the demo's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.learning.demo_run import NUM_PICTURES, measure, train_demo
from trainer.schema.folders import demo_dir
from trainer.tools.demo_measure import Accuracy, base_accuracy
from trainer.tools.demo_pictures import emblem_files, other_files
from trainer.tools.tiny_models import TRAINED_FILES, make_demo_bundle
from trainer.tools.train_demo_models import load_painter
from trainer.tools.world import SIDE

pytestmark = [pytest.mark.learning_slow, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Family:
    """Options that come after the demo's own and win over them, and flags of the demo's own that are left out."""

    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


FAMILIES: Final = {
    "block swap": Family(("--blocks_to_swap=3",)),
    "gradient checkpointing": Family(("--gradient_checkpointing",)),
    "gradient accumulation": Family(("--train_batch_size=4", "--gradient_accumulation_steps=2")),
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
}


@pytest.fixture(scope="module")
def base() -> Accuracy:
    return base_accuracy(load_painter(TRAINED_FILES), NUM_PICTURES)


def assert_learned(lora: Path, base: Accuracy) -> None:
    got = measure(lora)
    assert got.emblem.shown > 0.7, got
    assert got.others.colour >= base.colour - 0.15, got
    assert got.others.shape >= base.shape - 0.15, got


@pytest.mark.parametrize("family", FAMILIES)
def test_the_emblem_is_learned(family: str, base: Accuracy, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    assert_learned(train_demo(tmp_path, *chosen.options, without=chosen.without), base)


def test_the_emblem_is_learned_beside_regularisation_pictures(base: Accuracy, tmp_path: Path) -> None:
    """The same pictures with the ordinary ones marked as what they are."""
    images = make_demo_bundle(demo_dir()).images
    folders = {False: tmp_path / "emblem", True: tmp_path / "others"}
    for is_reg, files in ((False, emblem_files(images)), (True, other_files(images))):
        folders[is_reg].mkdir()
        for path in (*files, *(path.with_suffix(".txt") for path in files)):
            (folders[is_reg] / path.name).write_bytes(path.read_bytes())
    subsets = "".join(
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\nnum_repeats = {3 if is_reg else 6}\n"
        f"is_reg = {json.dumps(is_reg)}\n"
        for is_reg, folder in folders.items()
    )
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {SIDE}\nbatch_size = 8\ncaption_extension = '.txt'\n{subsets}", encoding="utf-8"
    )
    assert_learned(train_demo(tmp_path, dataset=dataset), base)
