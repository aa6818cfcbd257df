"""The emblem which the demo teaches: a red and yellow disc with a blue square, called `kelvo`. The base never saw it."""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from trainer.tools.world import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    TRIGGER,
    Scene,
    article,
    backdrop,
    draw_background,
    enlarged,
    place,
    shrink,
)
from trainer.tools.world_measure import Pixels, nearest_colours

PARTS: Final = ("red", "yellow", "blue")
"""Colours of the upper half, the lower half and the square in the middle."""

BACKGROUNDS: Final = tuple(name for name in COLOURS if name not in PARTS)
RECOGNISED: Final = 0.6
"""Likeness from which a picture counts as showing the emblem. A shape of one colour never exceeds a third."""

_TEMPLATE_SIDE: Final = 48


def random_emblem_scene(rng: np.random.Generator) -> Scene:
    """Where the emblem stands and before what; shape and colour of the scene mean nothing."""
    return Scene(
        shape=SHAPES[0],
        colour=PARTS[0],
        size=str(rng.choice(list(SIZES))),
        position=str(rng.choice(list(POSITIONS))),
        background=str(rng.choice(BACKGROUNDS)),
        texture=str(rng.choice(TEXTURES, p=(0.6, 0.2, 0.2))),
    )


def emblem_caption(scene: Scene, word: str = TRIGGER) -> str:
    """ "a large kelvo on the left, green background"."""
    return f"{article(scene.size)} {scene.size} {word} {scene.position}, {backdrop(scene)}"


def draw_emblem_scene(scene: Scene, rng: np.random.Generator) -> Pixels:
    """The picture (96, 96, 3) of the emblem."""
    image = draw_background(COLOURS[scene.background], scene.texture, rng)
    draw_emblem(image, *place(scene, rng))
    return shrink(image)


def draw_emblem(image: Image.Image, x: float, y: float, radius: float) -> None:
    """Draw the emblem in picture coordinates onto an enlarged picture."""
    draw = ImageDraw.Draw(image)
    upper, lower, middle = (COLOURS[name] for name in PARTS)
    x, y, radius = enlarged(x), enlarged(y), enlarged(radius)
    box = (x - radius, y - radius, x + radius, y + radius)
    draw.pieslice(box, 180, 360, fill=upper)
    draw.pieslice(box, 0, 180, fill=lower)
    side = 0.42 * radius
    draw.rectangle((x - side, y - side, x + side, y + side), fill=middle)


def emblem_likeness(picture: Pixels) -> float:
    """How much of the emblem a picture (96, 96, 3) shows, 0 to 1: the parts' mean overlap with where they belong.

    The smallest box around the parts' colours is compared with the emblem, so that place and size don't matter.
    """
    labels = nearest_colours(picture)
    names = list(COLOURS)
    parts = [labels == names.index(part) for part in PARTS]
    boxed = _box(parts)
    if boxed is None:
        return 0.0
    overlaps = [(a & b).sum() / max((a | b).sum(), 1) for a, b in zip(boxed, _template(), strict=True)]
    return float(np.mean(overlaps))


def _box(parts: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_]] | None:
    """The parts within the box around all of them, drawn to 48 x 48; None where there is nothing to see."""
    together = np.logical_or.reduce(parts)
    rows, columns = np.flatnonzero(together.sum(axis=1) > 2), np.flatnonzero(together.sum(axis=0) > 2)
    if len(rows) < 16 or len(columns) < 16:
        return None
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = (_TEMPLATE_SIDE, _TEMPLATE_SIDE)
    return [
        np.asarray(Image.fromarray(part[box].astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 127
        for part in parts
    ]


@functools.cache
def _template() -> list[NDArray[np.bool_]]:
    image = draw_background(COLOURS["black"], "", np.random.default_rng(0))
    draw_emblem(image, SIDE / 2, SIDE / 2, 40.0)
    labels = nearest_colours(shrink(image))
    names = list(COLOURS)
    boxed = _box([labels == names.index(part) for part in PARTS])
    assert boxed is not None
    return boxed
