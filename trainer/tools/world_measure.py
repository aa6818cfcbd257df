"""Says what a picture of the demo's world shows, from its pixels alone: no network that could be fooled the same way.

H W picture size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.tools.world import COLOURS, SHAPES, SIDE, draw_background, draw_shape, shade, shrink

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_EDGE: Final = 4
_LEAST_PIXELS: Final = 150
_TEMPLATE_SIDE: Final = 32
_NAMES: Final = tuple(COLOURS)
# Each colour as it is, then each as a texture varies it.
_PALETTE: Final = np.array([*COLOURS.values(), *(shade(colour) for colour in COLOURS.values())], dtype=np.float32)


@dataclass(frozen=True)
class Seen:
    """What was recognised; `shape` and `colour` are empty where nothing stands before the background.

    `likeness` is the overlap (intersection over union) of what is there with the shape, 0 to 1.
    """

    shape: str
    colour: str
    background: str
    likeness: float


def look(picture: Pixels) -> Seen:
    """Recognise what a picture (H, W, 3) shows."""
    labels = nearest_colours(picture)
    edge = np.concatenate(
        [labels[:_EDGE].ravel(), labels[-_EDGE:].ravel(), labels[:, :_EDGE].ravel(), labels[:, -_EDGE:].ravel()]
    )
    background = int(np.bincount(edge, minlength=len(_NAMES)).argmax())
    counts = np.bincount(labels.ravel(), minlength=len(_NAMES))
    counts[background] = 0
    colour = int(counts.argmax())
    if counts[colour] < _LEAST_PIXELS:
        return Seen("", "", _NAMES[background], 0.0)
    outline = _fit_box(labels == colour)
    overlaps = {shape: _overlap(outline, template) for shape, template in _templates().items()}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return Seen(shape, _NAMES[colour], _NAMES[background], overlaps[shape])


def nearest_colours(picture: Pixels) -> NDArray[np.int64]:
    """For each pixel (H, W) the index of the nearest of the world's colours, textured ones included."""
    distances = np.square(picture.astype(np.float32)[:, :, None] - _PALETTE).sum(axis=-1)
    return distances.argmin(axis=-1) % len(_NAMES)


def _fit_box(mask: Mask) -> Mask:
    """What of the mask lies in its bounding box, drawn to 32 x 32. Rows and columns of a pixel or two are left out."""
    rows = np.flatnonzero(mask.sum(axis=1) > 2)
    columns = np.flatnonzero(mask.sum(axis=0) > 2)
    if not len(rows) or not len(columns):
        return np.zeros((_TEMPLATE_SIDE, _TEMPLATE_SIDE), dtype=np.bool_)
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(box.astype(np.uint8) * 255).resize((_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.Resampling.BOX)
    return np.asarray(image) > 127


@functools.cache
def _templates() -> Mapping[str, Mask]:
    """Each shape filling 32 x 32."""
    rng = np.random.default_rng(0)
    white = _NAMES.index("white")
    templates: dict[str, Mask] = {}
    for shape in SHAPES:
        image = draw_background(COLOURS["black"], "", rng)
        draw_shape(image, shape, COLOURS["white"], SIDE / 2, SIDE / 2, 40.0)
        templates[shape] = _fit_box(nearest_colours(shrink(image)) == white)
    return templates


def _overlap(first: Mask, second: Mask) -> float:
    return float((first & second).sum() / max((first | second).sum(), 1))
