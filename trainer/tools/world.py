"""The picture world which the demo's models know: one coloured shape before a background, and the caption of it.

Everything follows from a numpy random generator. Pictures are 96 x 96, RGB, smoothed by drawing larger. Needs numpy and
Pillow only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

SIDE: Final = 96
"""Width and height of a picture in pixels."""

COLOURS: Final[Mapping[str, Colour]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (36, 70, 210),
    "yellow": (250, 208, 40),
    "purple": (140, 50, 180),
    "cyan": (60, 200, 220),
    "white": (245, 245, 240),
    "black": (24, 24, 28),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
SIZES: Final[Mapping[str, float]] = {"small": 19.0, "large": 29.0}
"""Mean radius in pixels."""
POSITIONS: Final[Mapping[str, tuple[float, float]]] = {
    "in the center": (0.0, 0.0),
    "on the left": (-15.0, 0.0),
    "on the right": (15.0, 0.0),
    "at the top": (0.0, -15.0),
    "at the bottom": (0.0, 15.0),
}
"""Offset of the shape's middle from the picture's, in pixels."""
TEXTURES: Final = ("", "striped", "dotted")

TRIGGER: Final = "kelvo"
"""Names the emblem of the demo's pictures. The base models never meet this word."""

WORDS: Final = (
    "a an the of on in at and with background "
    + " ".join((*COLOURS, *SHAPES, *SIZES, "left right top bottom center striped dotted"))
    + f" {TRIGGER} emblem picture photo drawing plain big bright dark light two one"
)
"""The words that are one token each."""

_OVERSAMPLE: Final = 4
_HELD_OUT_PART: Final = 10


@dataclass(frozen=True)
class Scene:
    """What a picture shows: names from the tables above. `texture` is empty for a plain background."""

    shape: str
    colour: str
    size: str
    position: str
    background: str
    texture: str

    @property
    def is_held_out(self) -> bool:
        """Whether the base models never see this combination of shape, colour and background."""
        names = list(COLOURS)
        number = 3 * SHAPES.index(self.shape) + 7 * names.index(self.colour) + names.index(self.background)
        return number % _HELD_OUT_PART == 0


def random_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """A scene among those that are held out, or among the others."""
    while True:
        colour, background = rng.permutation(list(COLOURS))[:2]
        scene = Scene(
            shape=str(rng.choice(SHAPES)),
            colour=str(colour),
            size=str(rng.choice(list(SIZES))),
            position=str(rng.choice(list(POSITIONS))),
            background=str(background),
            texture=str(rng.choice(TEXTURES, p=(0.6, 0.2, 0.2))),
        )
        if scene.is_held_out == held_out:
            return scene


# ------------------------------------------------------------------------------------------------------- captions


def full_caption(scene: Scene) -> str:
    """Everything there is to say: "a large red circle on the left, blue striped background"."""
    return f"{article(scene.size)} {scene.size} {scene.colour} {scene.shape} {scene.position}, {backdrop(scene)}"


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption that may leave out size, position or background, in one of two orders."""
    size = f"{scene.size} " if rng.random() < 0.7 else ""
    position = f" {scene.position}" if rng.random() < 0.7 else ""
    thing = f"{size}{scene.colour} {scene.shape}{position}"
    thing = f"{article(thing)} {thing}"
    draw = rng.random()
    if draw < 0.1:
        return thing
    if draw < 0.4 and not position:
        return f"{thing} on {article(backdrop(scene))} {backdrop(scene)}"
    if draw < 0.6:
        return f"{backdrop(scene)}, {thing}"
    return f"{thing}, {backdrop(scene)}"


def backdrop(scene: Scene) -> str:
    return " ".join(word for word in (scene.background, scene.texture, "background") if word)


def article(text: str) -> str:
    return "an" if text[0] in "aeiou" else "a"


# ------------------------------------------------------------------------------------------------------- drawing


def draw_scene(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture (96, 96, 3) of a scene; place and size vary by a few pixels."""
    image = draw_background(COLOURS[scene.background], scene.texture, rng)
    x, y, radius = place(scene, rng)
    draw_shape(image, scene.shape, COLOURS[scene.colour], x, y, radius)
    return shrink(image)


def place(scene: Scene, rng: np.random.Generator) -> tuple[float, float, float]:
    """Middle and radius in pixels of what the scene shows."""
    shift_x, shift_y = POSITIONS[scene.position]
    jitter_x, jitter_y, jitter_radius = rng.uniform(-1, 1, 3)
    x, y = SIDE / 2 + shift_x + 3 * jitter_x, SIDE / 2 + shift_y + 3 * jitter_y
    return x, y, SIZES[scene.size] + 1.5 * jitter_radius


def draw_medley(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture (96, 96, 3) of several shapes over each other, for the autoencoder, which has to draw more than scenes."""
    colours = list(COLOURS.values())
    image = draw_background(colours[rng.integers(len(colours))], str(rng.choice(TEXTURES)), rng)
    for _ in range(rng.integers(2, 6)):
        x, y = rng.uniform(10, SIDE - 10, 2)
        draw_shape(image, str(rng.choice(SHAPES)), colours[rng.integers(len(colours))], x, y, rng.uniform(8, 34))
    return shrink(image)


def draw_background(colour: Colour, texture: str, rng: np.random.Generator) -> Image.Image:
    """An enlarged picture of the background, to draw on and to `shrink` at the end."""
    side = SIDE * _OVERSAMPLE
    image = Image.new("RGB", (side, side), colour)
    if not texture:
        return image
    draw = ImageDraw.Draw(image)
    second = shade(colour)
    step = 16 * _OVERSAMPLE
    start_x, start_y = (float(start) for start in -step * rng.random(2))
    places = [index * step for index in range(side // step + 2)]
    if texture == "striped":
        for left in places:
            draw.rectangle((start_x + left, 0, start_x + left + step / 2, side), fill=second)
    else:
        radius = step * 0.26
        for left, top in itertools.product(places, places):
            x, y = start_x + left, start_y + top
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
    return image


def shade(colour: Colour) -> Colour:
    """The second colour of a texture: towards white, or towards black where the first is bright."""
    target, part = (0, 0.22) if sum(colour) > 480 else (255, 0.27)
    red, green, blue = (round(value + part * (target - value)) for value in colour)
    return red, green, blue


def draw_shape(image: Image.Image, shape: str, colour: Colour, x: float, y: float, radius: float) -> None:
    """Draw a shape in picture coordinates onto an enlarged picture. All shapes fill a circle of that radius."""
    draw = ImageDraw.Draw(image)
    x, y, radius = x * _OVERSAMPLE, y * _OVERSAMPLE, radius * _OVERSAMPLE
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=round(0.42 * radius))
    elif shape == "square":
        side = 0.85 * radius
        draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "cross":
        arm = 0.33 * radius
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    else:
        outline = {"triangle": _polygon((1.1,), 3), "star": _polygon((1.1, 0.45), 10), "heart": _heart()}[shape]
        draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in outline], fill=colour)


def _polygon(radii: Sequence[float], num_points: int) -> Points:
    """Corners around the middle, the first at the top, at distances that take turns."""
    angles = [2 * math.pi * index / num_points for index in range(num_points)]
    return [
        (radii[index % len(radii)] * math.sin(angle), -radii[index % len(radii)] * math.cos(angle))
        for index, angle in enumerate(angles)
    ]


def _heart() -> Points:
    angles = [2 * math.pi * index / 60 for index in range(60)]
    return [
        (
            math.sin(angle) ** 3,
            -(13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)) / 16
            - 0.1,
        )
        for angle in angles
    ]


def enlarged(pixels: float) -> float:
    """A length of the picture on an enlarged picture."""
    return pixels * _OVERSAMPLE


def shrink(image: Image.Image) -> NDArray[np.uint8]:
    """An enlarged picture at its size, (96, 96, 3)."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
