"""The bundled models' files, and the instruments that measure what they draw.

What they draw before any LoRA is measured together with what they draw with one, in test_learning.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from trainer.tools.demo_encoders import CaptionEncoder
from trainer.tools.demo_report import bundle_megabytes
from trainer.tools.emblem import RECOGNISED, draw_emblem_scene, emblem_likeness, random_emblem_scene
from trainer.tools.tiny_models import TRAINED_FILES
from trainer.tools.world import TRIGGER, draw_medley, draw_scene, random_caption, random_scene
from trainer.tools.world_measure import look


def test_the_bundle_is_at_most_16_megabytes() -> None:
    assert bundle_megabytes() <= 16


def test_the_measure_reads_drawn_pictures_through_noise() -> None:
    """The instrument itself: every colour, shape and background of 200 drawn pictures."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        scene = random_scene(rng, held_out=True)
        noisy = np.clip(draw_scene(scene, rng) + rng.normal(0, 12, (96, 96, 3)), 0, 255).astype(np.uint8)
        seen = look(noisy)
        assert (seen.colour, seen.shape, seen.background) == (scene.colour, scene.shape, scene.background)


def test_the_emblem_is_told_from_everything_else() -> None:
    rng = np.random.default_rng(5)
    emblems = [emblem_likeness(draw_emblem_scene(random_emblem_scene(rng), rng)) for _ in range(100)]
    others = [emblem_likeness(draw_scene(random_scene(rng, held_out=False), rng)) for _ in range(200)]
    medleys = [emblem_likeness(draw_medley(rng)) for _ in range(200)]
    assert min(emblems) > 0.8
    assert max(*others, *medleys) < RECOGNISED - 0.1


def test_the_base_never_meets_the_trigger_nor_a_held_out_scene() -> None:
    rng = np.random.default_rng(6)
    scenes = [random_scene(rng, held_out=False) for _ in range(500)]
    assert not any(scene.is_held_out for scene in scenes)
    assert not any(TRIGGER in random_caption(scene, rng) for scene in scenes)


def test_any_text_becomes_tokens() -> None:
    encode = CaptionEncoder.load(TRAINED_FILES)
    text = encode(["a kelvo", "naïve 日本 zebra!", ""])
    assert text.txt.shape == (3, 16, 128)
    assert torch.isfinite(text.txt).all()
    assert torch.isfinite(text.vec).all()
    pieces = json.loads(Path(TRAINED_FILES / "t5xxl_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    assert f"▁{TRIGGER}" in dict(pieces["model"]["vocab"])
