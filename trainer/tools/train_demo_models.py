"""Trains the demo's models from nothing and measures them: `python -m trainer.tools.train_demo_models --help`.

On two CPU cores that nobody else uses it takes some three hours. It may be broken off at any time and goes on where it was.
The same seed gives the same world, and on the same machine the same models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from trainer.model.autoencoder import AutoEncoder
from trainer.model.weights import load_autoencoder, load_flux
from trainer.tools.demo_encoders import CaptionEncoder, make_demo_encoders
from trainer.tools.demo_measure import Painter, base_accuracy, emblem_rate
from trainer.tools.learn_autoencoder import (
    learn_autoencoder,
    polish_decoder,
    save_autoencoder,
    signal_to_noise,
    world_pictures,
)
from trainer.tools.learn_flux import learn_flux, make_lessons, save_flux
from trainer.tools.tiny_models import TRAINED_FILES

FLUX_FILE: Final = "flux1-demo.safetensors"
AUTOENCODER_FILE: Final = "ae.safetensors"
_NUM_PSNR_PICTURES: Final = 64


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.tools.train_demo_models", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=TRAINED_FILES, help="folder for the models (default: the program's own)"
    )
    parser.add_argument("--state", type=Path, default=Path("demo_training"), help="folder for what resuming needs")
    parser.add_argument("--seed", type=int, default=1, help="everything random follows from it")
    parser.add_argument("--ae-steps", type=int, default=1500, help="training steps of the autoencoder")
    parser.add_argument("--decoder-steps", type=int, default=1000, help="of its decoder alone, on whole pictures")
    parser.add_argument("--flux-steps", type=int, default=5000, help="training steps of the transformer")
    parser.add_argument(
        "--fine-steps", type=int, default=2200, help="of it at high noise levels, where shapes are decided"
    )
    parser.add_argument("--guidance-steps", type=int, default=600, help="in which it learns what guidance means")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--samples", type=int, default=200, help="held-out captions to measure with")
    parser.add_argument("--measure", action="store_true", help="only measure the models in --out")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.measure:
        train_autoencoder(options.out, options.state, options.seed, options.ae_steps, options.decoder_steps)
        steps = (options.flux_steps, options.fine_steps, options.guidance_steps)
        train_flux(options.out, options.state, options.seed, steps)
    print_measures(options.out, options.samples)
    return 0


def train_autoencoder(out: Path, state: Path, seed: int, num_steps: int, num_decoder_steps: int) -> None:
    """Write the text encoders, which need no training, and the autoencoder to `out`."""
    make_demo_encoders(out, seed=seed)
    save_autoencoder(learn_autoencoder(state, seed=seed, num_steps=num_steps, report=report), out / AUTOENCODER_FILE)
    # From the file, since its rounding is part of what the decoder and the transformer have to live with.
    autoencoder = load_autoencoder(out / AUTOENCODER_FILE, torch.float32, "cpu")
    polish_decoder(state, autoencoder, seed=seed, num_steps=num_decoder_steps, report=report)
    save_autoencoder(autoencoder, out / AUTOENCODER_FILE)
    report(f"autoencoder: PSNR {autoencoder_psnr(autoencoder):.1f} dB on held-out pictures")


def train_flux(out: Path, state: Path, seed: int, num_steps: tuple[int, int, int]) -> None:
    """Write the transformer to `out`, which holds the other models already."""
    autoencoder = load_autoencoder(out / AUTOENCODER_FILE, torch.float32, "cpu")
    flux = learn_flux(
        state,
        lambda: make_lessons(autoencoder, CaptionEncoder.load(out), seed=seed + 2, report=report),
        seed=seed,
        num_steps=num_steps,
        report=report,
    )
    save_flux(flux, out / FLUX_FILE)


def print_measures(folder: Path, num_samples: int) -> None:
    painter = load_painter(folder)
    report(f"autoencoder: PSNR {autoencoder_psnr(painter.autoencoder):.1f} dB on held-out pictures")
    report(f"transformer, {num_samples} held-out captions: {base_accuracy(painter, num_samples)}")
    report(f"emblem drawn without a LoRA: {emblem_rate(painter, num_samples // 2):.1%}")


def load_painter(folder: Path) -> Painter:
    """The models of the bundle in `folder`, in fp32 on the CPU."""
    return Painter(
        load_flux(folder / FLUX_FILE, torch.float32, "cpu"),
        load_autoencoder(folder / AUTOENCODER_FILE, torch.float32, "cpu"),
        CaptionEncoder.load(folder),
    )


def autoencoder_psnr(model: AutoEncoder) -> float:
    return signal_to_noise(model, world_pictures(99, _NUM_PSNR_PICTURES, held_out=True, with_medleys=False))


def report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
