"""Pictures of one coloured shape each, with captions: something small that a model can visibly learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "blue": (41, 98, 214),
    "green": (46, 160, 67),
    "yellow": (247, 201, 47),
    "purple": (128, 62, 176),
    "orange": (240, 126, 34),
    "white": (245, 245, 240),
    "teal": (28, 150, 150),
}
_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
_OVERSAMPLE = 4


def make_images(
    folder: Path,
    count: int,
    captions: bool = True,
    *,
    sizes: Sequence[tuple[int, int]] = ((256, 256), (320, 256), (256, 320)),
    trigger: str = "fluxdemo",
    seed: int = 5,
) -> list[Path]:
    """Draw `count` pictures of one coloured shape each, as PNG, and beside each its caption as .txt.

    `sizes` are (width, height) in pixels and take turns. Captions begin with `trigger`.
    Returns the pictures' paths in the order of their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pairs = [(front, back) for front, back in itertools.permutations(_COLOURS, 2)]
    order = rng.permutation(len(pairs))
    paths: list[Path] = []
    for index in range(count):
        shape = _SHAPES[index % len(_SHAPES)]
        front, back = pairs[order[index % len(order)]]
        path = folder / f"{index + 1:03d}_{front}_{shape}.png"
        _draw(rng, shape, _COLOURS[front], _COLOURS[back], sizes[index % len(sizes)]).save(path)
        if captions:
            article = "an" if front[0] in "aeiou" else "a"
            text = f"{trigger}, {article} {front} {shape} on a {back} background\n"
            path.with_suffix(".txt").write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def _draw(
    rng: np.random.Generator,
    shape: str,
    front: tuple[int, int, int],
    back: tuple[int, int, int],
    size: tuple[int, int],
) -> Image.Image:
    width, height = (side * _OVERSAMPLE for side in size)
    image = Image.new("RGB", (width, height), back)
    draw = ImageDraw.Draw(image)
    radius = min(width, height) * rng.uniform(0.27, 0.36)
    x = width / 2 + rng.uniform(-0.08, 0.08) * width
    y = height / 2 + rng.uniform(-0.08, 0.08) * height
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=front)
    elif shape == "square":
        draw.rectangle(box, fill=front)
    elif shape == "ring":
        draw.ellipse(box, outline=front, width=round(0.4 * radius))
    elif shape == "cross":
        arm = 0.32 * radius
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=front)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=front)
    else:
        radii = (radius,) if shape == "triangle" else (radius, 0.45 * radius)
        num_points = 3 if shape == "triangle" else 10
        points = [
            (
                x + radii[index % len(radii)] * math.sin(2 * math.pi * index / num_points),
                y - radii[index % len(radii)] * math.cos(2 * math.pi * index / num_points),
            )
            for index in range(num_points)
        ]
        draw.polygon(points, fill=front)
    return image.resize(size, Image.Resampling.BOX)
