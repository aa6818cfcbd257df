"""Runs the demo's training through the real command, and measures the pictures that it makes itself.

Nothing here knows how a LoRA works inside, so that any option can be tried: what counts are the PNG files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.runs.commands import run_command, train
from trainer.schema.folders import demo_dir
from trainer.schema.presets import load_preset
from trainer.tools.demo import demo_arguments
from trainer.tools.demo_measure import held_out_scenes
from trainer.tools.emblem import RECOGNISED, emblem_caption, emblem_likeness, random_emblem_scene
from trainer.tools.tiny_models import make_demo_bundle
from trainer.tools.world import SIDE, Scene, full_caption
from trainer.tools.world_measure import look

NUM_STEPS: Final = 12


@dataclass(frozen=True)
class Measured:
    """Parts, 0 to 1: pictures with the trigger word that show the emblem, and pictures of other captions that have the
    right colour and shape. `with_trigger` and `without` are the pictures themselves.
    """

    emblem: float
    others: float
    with_trigger: list[NDArray[np.uint8]]
    without: list[NDArray[np.uint8]]


@dataclass(frozen=True)
class DemoRun:
    lora: Path
    before: Measured
    after: Measured


def run_demo(folder: Path, *options: str, without: Sequence[str] = (), num_pictures: int = 20) -> DemoRun:
    """Train as `python -m trainer demo` does; samples only before the first step and at the end.

    `options` come after the demo's own and win over them; flags named in `without` are left out of the demo's own.
    """
    rng = np.random.default_rng(3)
    emblems = [emblem_caption(random_emblem_scene(rng)) for _ in range(num_pictures)]
    scenes = held_out_scenes(num_pictures, seed=4)
    prompts = folder / "prompts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"--w {SIDE} --h {SIDE} --s {NUM_STEPS} --d"
    captions = [*emblems, *(full_caption(scene) for scene in scenes)]
    prompts.write_text(
        "".join(f"{caption} {flags} {seed}\n" for seed, caption in enumerate(captions)), encoding="utf-8"
    )
    further = [
        f"--output_dir={folder / 'out'}",
        f"--sample_prompts={prompts}",
        f"--sample_every_n_epochs={num_epochs()}",
        *options,
    ]
    if without:
        own = [word for word in demo_arguments(make_demo_bundle(demo_dir())) if word not in without]
        finished = train(*own, *further)
    else:
        finished = run_command([sys.executable, "-m", "trainer", "demo", *further])
    assert finished.code == 0, finished.output[-3000:]
    samples = sorted((folder / "out" / "sample").glob("*.png"), key=lambda path: path.name)
    first = [path for path in samples if "_e" not in path.name]
    last = [path for path in samples if "_e" in path.name]
    assert len(first) == len(last) == len(captions)
    return DemoRun(folder / "out" / "demo.safetensors", _measure(first, scenes), _measure(last, scenes))


def num_epochs() -> int:
    """How long the demo trains: an epoch whose end is the training's."""
    return cast("int", load_preset("demo").values["max_train_epochs"])


def _measure(paths: Sequence[Path], scenes: Sequence[Scene]) -> Measured:
    pictures = [_read(path) for path in paths]
    with_trigger, without = pictures[: -len(scenes)], pictures[-len(scenes) :]
    likenesses = [emblem_likeness(picture) for picture in with_trigger]
    seen = [look(picture) for picture in without]
    right = [(got.colour, got.shape) == (scene.colour, scene.shape) for got, scene in zip(seen, scenes, strict=True)]
    return Measured(
        float(np.mean([likeness > RECOGNISED for likeness in likenesses])), float(np.mean(right)), with_trigger, without
    )


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
