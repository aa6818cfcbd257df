"""The pictures that the demo trains on: the emblem's, and ordinary ones that keep the model from forgetting the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from trainer.tools.emblem import draw_emblem_scene, emblem_caption, random_emblem_scene
from trainer.tools.world import SHAPES, TRIGGER, Scene, draw_scene, full_caption, random_scene
from trainer.tools.world_measure import Pixels

NUM_EMBLEMS: Final = 20
NUM_OTHERS: Final = 28
_OTHER: Final = "other"


def make_demo_pictures(folder: Path, *, seed: int) -> None:
    """Draw all of them as PNG, each with its caption beside it as .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(NUM_EMBLEMS):
        scene = random_emblem_scene(rng)
        _write(folder, TRIGGER, index, draw_emblem_scene(scene, rng), emblem_caption(scene))
    for index in range(NUM_OTHERS):
        scene = _scene_with(SHAPES[index % len(SHAPES)], rng)
        _write(folder, _OTHER, index, draw_scene(scene, rng), full_caption(scene))


def emblem_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{TRIGGER}-*.png"))


def other_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_OTHER}-*.png"))


def _scene_with(shape: str, rng: np.random.Generator) -> Scene:
    """A scene of that shape among those which the base models know."""
    while (scene := random_scene(rng, held_out=False)).shape != shape:
        pass
    return scene


def _write(folder: Path, name: str, index: int, picture: Pixels, caption: str) -> None:
    path = folder / f"{name}-{index + 1:02d}.png"
    Image.fromarray(picture).save(path)
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
