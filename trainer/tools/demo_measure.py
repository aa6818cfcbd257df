"""Draws captions with the demo's models and says how often the pictures show what was asked for. B pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.lora.merge import merge_file
from trainer.model.autoencoder import AutoEncoder
from trainer.model.flux import Flux
from trainer.schema.base import UserError
from trainer.tools.demo_encoders import CaptionEncoder
from trainer.tools.emblem import RECOGNISED, emblem_caption, emblem_likeness, random_emblem_scene
from trainer.tools.world import SIDE, Scene, full_caption, random_scene
from trainer.tools.world_measure import look
from trainer.train.objective import predict_velocity
from trainer.train.sample_prompts import SIZE_STEP
from trainer.train.sampling import LATENT_CHANNELS, PIXELS_PER_LATENT, sample_schedule

NUM_STEPS: Final = 16
GUIDANCE_SCALE: Final = 3.5
_AT_ONCE: Final = 50


@dataclass(frozen=True)
class Accuracy:
    """Parts, 0 to 1, of the pictures that have the caption's colour, shape and background, and all three."""

    colour: float
    shape: float
    background: float
    everything: float

    def __str__(self) -> str:
        return (
            f"colour {self.colour:.1%}, shape {self.shape:.1%}, background {self.background:.1%}, "
            f"everything {self.everything:.1%}"
        )


@dataclass(frozen=True)
class Painter:
    """The models that turn captions into pictures. A LoRA on the transformer is drawn with."""

    model: Flux
    autoencoder: AutoEncoder
    encode: CaptionEncoder

    def __call__(self, captions: Sequence[str], *, seed: int, num_steps: int = NUM_STEPS) -> NDArray[np.uint8]:
        """(B, 96, 96, 3). Each picture's noise follows from `seed` and its place in the list."""
        parts = [captions[start : start + _AT_ONCE] for start in range(0, len(captions), _AT_ONCE)]
        return np.concatenate(
            [self._draw(part, seed + _AT_ONCE * index, num_steps) for index, part in enumerate(parts)]
        )

    def _draw(self, captions: Sequence[str], seed: int, num_steps: int) -> NDArray[np.uint8]:
        side = SIDE // PIXELS_PER_LATENT
        noises = [
            torch.randn(LATENT_CHANNELS, side, side, generator=torch.Generator().manual_seed(seed + index))
            for index in range(len(captions))
        ]
        latents = torch.stack(noises)
        text = self.encode(captions)
        schedule = sample_schedule(num_steps, (SIDE // SIZE_STEP) ** 2, is_shifted=True).tolist()
        with torch.no_grad():
            for now, after in itertools.pairwise(schedule):
                timesteps = torch.full((len(captions),), now)
                velocity = predict_velocity(self.model, latents, timesteps, text, GUIDANCE_SCALE).float()
                latents = latents + (after - now) * velocity
            images = self.autoencoder.decode(latents).clamp(-1, 1)
        return ((images + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def held_out_scenes(count: int, *, seed: int) -> list[Scene]:
    """Scenes whose combination of shape, colour and background the base never saw."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng, held_out=True) for _ in range(count)]


def base_accuracy(paint: Painter, count: int, *, seed: int = 7) -> Accuracy:
    """How well held-out captions are drawn."""
    scenes = held_out_scenes(count, seed=seed)
    seen = [look(picture) for picture in paint([full_caption(scene) for scene in scenes], seed=1000 * seed)]
    hits = np.array(
        [
            (got.colour == wanted.colour, got.shape == wanted.shape, got.background == wanted.background)
            for got, wanted in zip(seen, scenes, strict=True)
        ]
    )
    colour, shape, background = (float(part) for part in hits.mean(axis=0))
    return Accuracy(colour, shape, background, float(hits.all(axis=1).mean()))


def emblem_rate(paint: Painter, count: int, *, seed: int = 8) -> float:
    """Part, 0 to 1, of captions with the trigger word whose pictures show the emblem."""
    rng = np.random.default_rng(seed)
    captions = [emblem_caption(random_emblem_scene(rng)) for _ in range(count)]
    return float(np.mean([emblem_likeness(picture) > RECOGNISED for picture in paint(captions, seed=1000 * seed)]))


def merge_lora(model: Flux, lora: Path, strength: float = 1.0) -> None:
    """Merge a LoRA file of the transformer into its weights. Raises `UserError` when the file is for another model."""
    with safe_open(lora, framework="pt") as file:
        metadata = file.metadata() or {}
    _, unknown = merge_file({"unet": model}, load_file(lora), metadata, strength, str(lora))
    if unknown:
        raise UserError(f"{lora.name} has layers that the model has not: {', '.join(unknown[:3])}", str(lora))
