"""Trains the demo in this process with further options, short or whole, and says what has to come of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from trainer.schema.cli import parse_command_line
from trainer.schema.folders import demo_dir
from trainer.tools.demo import demo_arguments
from trainer.tools.demo_measure import Accuracy
from trainer.tools.demo_pictures import emblem_folder
from trainer.tools.demo_report import EmblemRate, demo_lora, emblem_rate, held_out_emblems, loss, painter_with
from trainer.tools.tiny_models import TRAINED_FILES, DemoBundle, make_demo_bundle
from trainer.tools.train_demo_models import load_painter
from trainer.tools.world import SIDE
from trainer.train.conditioning import TextInputs
from trainer.train.recipe import train
from trainer.train.reporting import Reporter

NO_SAMPLES: Final = ("--sample_prompts", "--sample_every_n_epochs", "--sample_at_first", "--save_every_n_epochs")
NUM_PICTURES: Final = 32
SHORT: Final = ("--max_train_epochs=4", "--guidance_scale=1", "--learning_rate=3.5e-3")
"""There is nothing to keep, so that guidance 1 and a higher rate teach the emblem faster."""


def train_demo(folder: Path, *options: str, without: Sequence[str] = (), dataset: Path | None = None) -> Path:
    """The LoRA of a demo without samples. `options` come after the demo's own and win over them; flags named in `without`
    are left out of the demo's own; `dataset` takes the place of its dataset file.
    """
    bundle: DemoBundle = make_demo_bundle(demo_dir())
    left_out = {*NO_SAMPLES, *without}
    own = [word for word in demo_arguments(bundle) if word.split("=")[0] not in left_out]
    words = [*own, f"--output_dir={folder}", *options]
    if dataset is not None:
        words.append(f"--dataset_config={dataset}")
    train(parse_command_line(words), Reporter(is_main=False))
    return demo_lora(folder)


def emblem_pictures() -> Path:
    """The demo's pictures of the emblem with their captions."""
    return emblem_folder(make_demo_bundle(demo_dir()).images)


def subset_toml(images: Path, *more: str, num_repeats: int = 6) -> str:
    lines = ("[[datasets.subsets]]", f"image_dir = {json.dumps(str(images))}", f"num_repeats = {num_repeats}", *more)
    return "\n".join(lines) + "\n"


def train_short(folder: Path, *options: str, subsets: str | None = None, without: Sequence[str] = ()) -> Path:
    """The LoRA of 120 steps on the emblem alone, four pictures each: a sixth of the whole demo's work.

    `subsets` takes the place of the emblem's pictures.
    """
    dataset = folder / "short.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {SIDE}\nbatch_size = 4\ncaption_extension = '.txt'\n"
        + (subsets or subset_toml(emblem_pictures())),
        encoding="utf-8",
    )
    return train_demo(folder / "out", *SHORT, *options, without=without, dataset=dataset)


@dataclass(frozen=True)
class Learned:
    """What the pictures show, and the loss on pictures of the emblem that were not trained on, as a part of the base's."""

    emblem: EmblemRate
    loss_ratio: float


def measure(lora: Path) -> Learned:
    painter = painter_with(lora)
    return Learned(emblem_rate(painter, NUM_PICTURES), loss(painter.model, _held_out()) / _loss_of_base())


@functools.cache
def _held_out() -> tuple[Tensor, TextInputs]:
    return held_out_emblems()


@functools.cache
def _loss_of_base() -> float:
    return loss(load_painter(TRAINED_FILES).model, _held_out())


def assert_loss_fell(learned: Learned, *, to: float = 0.45) -> None:
    """Seen after a short training: 0.33, with most options 0.32 to 0.38. It is 1 where nothing is learned."""
    assert learned.loss_ratio < to, learned


def assert_emblem_learned(emblem: EmblemRate, *, at_least: float = 0.7) -> None:
    """The emblem comes with its trigger word, and before the background that the caption names.

    The whole demo is held to 0.7; a training that was cut short to less.
    """
    assert emblem.shown > at_least, emblem
    assert emblem.as_captioned > at_least, emblem


def assert_others_kept(others: Accuracy, base: Accuracy, *, within: float = 0.1) -> None:
    """What the base could draw is drawn as before."""
    assert others.colour >= base.colour - within, (others, base)
    assert others.shape >= base.shape - within, (others, base)
    assert others.background >= base.background - within, (others, base)
    assert others.everything >= base.everything - within, (others, base)
