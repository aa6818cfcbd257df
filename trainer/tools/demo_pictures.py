"""The pictures that the demo trains on: the emblem's, and ordinary ones on which the LoRA is held to change nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from trainer.tools.emblem import draw_emblem_scene, emblem_caption, random_emblem_scene
from trainer.tools.world import SHAPES, SIDE, TRIGGER, Scene, draw_scene, full_caption, random_scene
from trainer.tools.world_measure import Pixels

NUM_EMBLEMS: Final = 20
NUM_OTHERS: Final = 56
_EMBLEM_FOLDER: Final = TRIGGER
_OTHER_FOLDER: Final = "ordinary"
EMBLEM_REPEATS: Final = 8
OTHER_REPEATS: Final = 3
"""So that both kinds are met equally often."""


def make_demo_pictures(folder: Path, *, seed: int) -> None:
    """Draw all of them as PNG, in a folder for each kind, each with its caption beside it as .txt."""
    for kind in (emblem_folder(folder), other_folder(folder)):
        kind.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    scenes = [random_emblem_scene(rng) for _ in range(NUM_EMBLEMS)]
    for index, scene in enumerate(scenes):
        _write(emblem_folder(folder), index, draw_emblem_scene(scene, rng), emblem_caption(scene))
    for index in range(NUM_OTHERS):
        scene = _scene_with(SHAPES[index % len(SHAPES)], rng)
        _write(other_folder(folder), index, draw_scene(scene, rng), full_caption(scene))


def emblem_folder(folder: Path) -> Path:
    return folder / _EMBLEM_FOLDER


def other_folder(folder: Path) -> Path:
    return folder / _OTHER_FOLDER


def emblem_files(folder: Path) -> list[Path]:
    return sorted(emblem_folder(folder).glob("*.png"))


def other_files(folder: Path) -> list[Path]:
    return sorted(other_folder(folder).glob("*.png"))


def demo_dataset_toml(folder: Path) -> str:
    """The dataset file for the pictures in `folder`.

    The ordinary ones are not learnt: with `diff_output_preservation` the LoRA is held, there, to what the model draws
    without it. Learning them as well would do less for them, and leaves less of the emblem.
    """
    return "\n".join(
        (
            "[general]",
            "enable_bucket = false",
            'caption_extension = ".txt"',
            "",
            "[[datasets]]",
            f"resolution = {SIDE}",
            "batch_size = 8",
            "",
            "  [[datasets.subsets]]",
            f"  image_dir = {_toml_text(emblem_folder(folder))}",
            f"  num_repeats = {EMBLEM_REPEATS}",
            "",
            "  [[datasets.subsets]]",
            f"  image_dir = {_toml_text(other_folder(folder))}",
            f"  num_repeats = {OTHER_REPEATS}",
            "  custom_attributes = {diff_output_preservation = true}",
            "",
        )
    )


def _toml_text(path: Path) -> str:
    # A JSON string is also a TOML basic string as long as only ASCII control characters are escaped.
    return json.dumps(os.fspath(path), ensure_ascii=False)


def _scene_with(shape: str, rng: np.random.Generator) -> Scene:
    """A scene of that shape among those which the base models know."""
    while (scene := random_scene(rng, held_out=False)).shape != shape:
        pass
    return scene


def _write(folder: Path, index: int, picture: Pixels, caption: str) -> None:
    path = folder / f"{index + 1:02d}.png"
    Image.fromarray(picture).save(path)
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
