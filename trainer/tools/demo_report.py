"""Trains the demo and prints all that can be measured of it: `python -m trainer.tools.demo_report`.

With `--lora FILE` it measures that LoRA of the demo's models and trains nothing. B pictures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.lora.from_file import spec_from_file
from trainer.lora.merge import merge_file
from trainer.lora.naming import Component
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.weights import load_flux
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec
from trainer.tools.demo_measure import Accuracy, Painter, base_accuracy
from trainer.tools.emblem import (
    RECOGNISED,
    draw_emblem_scene,
    emblem_caption,
    emblem_likeness,
    random_emblem_scene,
)
from trainer.tools.learn_autoencoder import to_images
from trainer.tools.tiny_models import TRAINED_FILES
from trainer.tools.train_demo_models import FLUX_FILE, autoencoder_psnr, load_painter
from trainer.tools.world_measure import look
from trainer.train.conditioning import TextInputs
from trainer.train.flow import add_noise, velocity_target
from trainer.train.objective import predict_velocity

PROGRAM: Final = Path(__file__).parents[2]
_SIGMAS: Final = (0.3, 0.6, 0.9)
"""Three noise levels, in which pictures take shape."""
_NUM_LOSS_PICTURES: Final = 24


@dataclass(frozen=True)
class EmblemRate:
    """Parts, 0 to 1, of the captions with the trigger word whose pictures show the emblem (`shown`), and show it before
    the background that the caption names (`as_captioned`).
    """

    shown: float
    as_captioned: float


@dataclass(frozen=True)
class State:
    """What there is to say about one state of the models. `loss` is that on held-out pictures of the emblem."""

    emblem: EmblemRate
    others: Accuracy
    loss: float


@dataclass(frozen=True)
class DemoReport:
    """Everything measured of the demo before and after training.

    `strength_0` is the largest difference of a prediction with the LoRA at strength 0 to one of the base, `merged` that
    between the LoRA in the weights and beside them, `effect` that which the LoRA makes at all.
    """

    psnr: float
    before: State
    after: State
    strength_0: float
    merged: float
    effect: float

    def lines(self) -> list[str]:
        """For the console."""
        return [
            f"files of the models: {bundle_megabytes():.1f} MB",
            f"autoencoder: PSNR {self.psnr:.1f} dB on held-out pictures",
            *_lines("before", self.before),
            *_lines("after", self.after),
            f"LoRA at strength 0 against the base: {self.strength_0:g}",
            f"LoRA merged against applied: {self.merged:.2g}, where the LoRA itself makes {self.effect:.2g}",
        ]


def bundle_megabytes() -> float:
    """Size of all model and tokenizer files that come with the program, in 10**6 bytes."""
    return sum(path.stat().st_size for path in TRAINED_FILES.rglob("*") if path.is_file()) / 1e6


def _lines(name: str, state: State) -> list[str]:
    return [
        f"{name}: emblem shown with the trigger word {state.emblem.shown:.1%}, as captioned {state.emblem.as_captioned:.1%}",
        f"{name}: held-out captions without it: {state.others}",
        f"{name}: loss on held-out pictures of the emblem {state.loss:.4f}",
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.tools.demo_report", description=__doc__)
    parser.add_argument("--lora", type=Path, default=None, help="a trained LoRA of the demo's models to measure")
    parser.add_argument("--samples", type=int, default=200, help="captions to measure with, half as many of the emblem")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        lora: Path | None = options.lora
        if lora is None:
            seconds = run_demo(Path(name))
            print(f"the demo's training took {seconds:.0f} s with {torch.get_num_threads()} threads")
            lora = demo_lora(Path(name))
        try:
            report = measure_demo(lora, options.samples)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    print("\n".join(report.lines()))
    return 0


def run_demo(folder: Path, *options: str) -> float:
    """Train the demo into `folder` by its command; returns the seconds it took, start and samples included."""
    started = time.monotonic()
    command = [sys.executable, "-m", "trainer", "demo", f"--output_dir={folder}", *options]
    subprocess.run(command, cwd=PROGRAM, check=True, stdin=subprocess.DEVNULL)
    return time.monotonic() - started


def demo_lora(folder: Path) -> Path:
    """The LoRA of a demo that was trained into `folder`."""
    return folder / "demo.safetensors"


def measure_demo(lora: Path, num_samples: int) -> DemoReport:
    """Raises `UserError` when the file is no LoRA of the demo's models."""
    pictures = held_out_emblems()
    before, after = load_painter(TRAINED_FILES), painter_with(lora)
    base = velocity(before.model, pictures, 0.6)[0]
    applied = velocity(model_with(lora, 1.0), pictures, 0.6)[0]
    return DemoReport(
        psnr=autoencoder_psnr(before.autoencoder),
        before=measure_state(before, num_samples, pictures),
        after=measure_state(after, num_samples, pictures),
        strength_0=_distance(velocity(model_with(lora, 0.0), pictures, 0.6)[0], base),
        merged=_distance(velocity(after.model, pictures, 0.6)[0], applied),
        effect=_distance(applied, base),
    )


def _distance(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def measure_state(painter: Painter, num_samples: int, pictures: tuple[Tensor, TextInputs]) -> State:
    return State(
        emblem_rate(painter, max(num_samples // 2, 1)),
        base_accuracy(painter, num_samples),
        loss(painter.model, pictures),
    )


def emblem_rate(painter: Painter, count: int, *, seed: int = 8) -> EmblemRate:
    rng = np.random.default_rng(seed)
    scenes = [random_emblem_scene(rng) for _ in range(count)]
    pictures = painter([emblem_caption(scene) for scene in scenes], seed=1000 * seed)
    shown = np.array([emblem_likeness(picture) > RECOGNISED for picture in pictures])
    right = np.array(
        [look(picture).background == scene.background for picture, scene in zip(pictures, scenes, strict=True)]
    )
    return EmblemRate(float(shown.mean()), float((shown & right).mean()))


# ------------------------------------------------------------------------------------------------- models with a LoRA


def painter_with(lora: Path, strength: float = 1.0) -> Painter:
    """The demo's models with a LoRA file merged into those that it is for."""
    painter = load_painter(TRAINED_FILES)
    state, metadata = _read(lora)
    models: dict[Component, nn.Module] = {
        "unet": painter.model,
        "te1": painter.encode.clip.model,
        "te3": painter.encode.t5.model,
    }
    _, unknown = merge_file(models, state, metadata, strength, str(lora))
    if unknown:
        raise UserError(f"the models have no layers {', '.join(unknown[:3])}", str(lora), "Give a LoRA of the demo.")
    return painter


def model_with(lora: Path, strength: float) -> Flux:
    """The demo's transformer with a LoRA file of it applied beside the weights."""
    model = load_flux(TRAINED_FILES / FLUX_FILE, torch.float32, "cpu")
    state, metadata = _read(lora)
    spec = spec_from_file(LoraSpec(), state, metadata, str(lora))
    network = LoraNetwork.attach(model, None, spec, torch.Generator().manual_seed(0))
    network.load_file(lora)
    network.eval()
    network.set_multiplier(strength)
    return model


def _read(lora: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(lora, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    return load_file(lora), metadata


# -------------------------------------------------------------------------------------------------- loss on the emblem


def held_out_emblems() -> tuple[Tensor, TextInputs]:
    """Latents (B, 16, 12, 12) of pictures of the emblem that the demo does not train on, and their captions' encodings."""
    rng = np.random.default_rng(77)
    scenes = [random_emblem_scene(rng) for _ in range(_NUM_LOSS_PICTURES)]
    painter = load_painter(TRAINED_FILES)
    images = to_images(np.stack([draw_emblem_scene(scene, rng) for scene in scenes]))
    with torch.no_grad():
        latents = painter.autoencoder.encode(images, sample=False)
    return latents, painter.encode([emblem_caption(scene) for scene in scenes])


def velocity(model: Flux, pictures: tuple[Tensor, TextInputs], sigma: float) -> tuple[Tensor, Tensor]:
    """What the model predicts for pictures at a noise level, and what it should; both (B, 16, 12, 12)."""
    latents, text = pictures
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = torch.full((len(latents),), sigma)
    noisy = add_noise(
        latents, noise, sigmas, ip_noise_gamma=None, ip_noise_gamma_random_strength=False, generator=generator
    )
    with torch.no_grad():
        return predict_velocity(model, noisy, sigmas, text, 1.0), velocity_target(latents, noise)


def loss(model: Flux, pictures: tuple[Tensor, TextInputs]) -> float:
    parts = [velocity(model, pictures, sigma) for sigma in _SIGMAS]
    return float(np.mean([(got - wanted).square().mean().item() for got, wanted in parts]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
