"""Trains the demo in this process with further options, and measures what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.schema.cli import parse_command_line
from trainer.schema.folders import demo_dir
from trainer.tools.demo import demo_arguments
from trainer.tools.demo_measure import Accuracy, base_accuracy
from trainer.tools.demo_report import EmblemRate, demo_lora, emblem_rate, painter_with
from trainer.tools.tiny_models import DemoBundle, make_demo_bundle
from trainer.train.recipe import train
from trainer.train.reporting import Reporter

NUM_PICTURES = 40
NO_SAMPLES = ("--sample_prompts", "--sample_every_n_epochs", "--sample_at_first", "--save_every_n_epochs")


@dataclass(frozen=True)
class Learned:
    """Parts, 0 to 1, measured with the LoRA merged into the demo's models."""

    emblem: EmblemRate
    others: Accuracy


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


def measure(lora: Path) -> Learned:
    painter = painter_with(lora)
    return Learned(emblem_rate(painter, NUM_PICTURES), base_accuracy(painter, NUM_PICTURES))


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
