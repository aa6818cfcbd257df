"""Whether training works, not only whether it runs: the demo learns an emblem and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.learning.demo_run import DemoRun, run_demo
from trainer.lora.network import LoraNetwork
from trainer.model.autoencoder import AutoEncoder
from trainer.model.flux import Flux
from trainer.model.weights import load_flux
from trainer.schema.lora_spec import LoraSpec
from trainer.tools.demo_encoders import CaptionEncoder
from trainer.tools.demo_measure import merge_lora
from trainer.tools.emblem import draw_emblem_scene, emblem_caption, random_emblem_scene
from trainer.tools.learn_autoencoder import to_images
from trainer.tools.tiny_models import TRAINED_FILES
from trainer.tools.train_demo_models import FLUX_FILE, load_painter
from trainer.train.conditioning import TextInputs
from trainer.train.flow import add_noise, velocity_target
from trainer.train.objective import predict_velocity

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    return run_demo(tmp_path_factory.mktemp("demo"))


def base() -> Flux:
    return load_flux(TRAINED_FILES / FLUX_FILE, torch.float32, "cpu")


def with_lora(lora: Path, strength: float) -> Flux:
    model = base()
    network = LoraNetwork.attach(model, None, LoraSpec(rank=16, alpha=16.0), torch.Generator().manual_seed(0))
    report = network.load_file(lora)
    assert not report.missing
    assert not report.unexpected
    network.eval()
    network.set_multiplier(strength)
    return model


def test_the_trigger_brings_the_emblem_after_training_and_not_before(demo: DemoRun) -> None:
    assert demo.before.emblem < 0.1
    assert demo.after.emblem > 0.7


def test_prompts_without_the_trigger_are_drawn_as_before(demo: DemoRun) -> None:
    assert demo.before.others >= 0.7
    assert demo.after.others >= demo.before.others - 0.1


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, TextInputs]:
    """Latents (24, 16, 12, 12) of pictures of the emblem that were not trained on, and their captions' encodings."""
    rng = np.random.default_rng(77)
    scenes = [random_emblem_scene(rng) for _ in range(24)]
    autoencoder: AutoEncoder = load_painter(TRAINED_FILES).autoencoder
    with torch.no_grad():
        latents = autoencoder.encode(
            to_images(np.stack([draw_emblem_scene(scene, rng) for scene in scenes])), sample=False
        )
    return latents, CaptionEncoder.load(TRAINED_FILES)([emblem_caption(scene) for scene in scenes])


def velocities(model: Flux, held_out: tuple[Tensor, TextInputs], sigma: float) -> tuple[Tensor, Tensor]:
    """What the model predicts for noisy held-out pictures, and what it should."""
    latents, text = held_out
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = torch.full((len(latents),), sigma)
    noisy = add_noise(
        latents, noise, sigmas, ip_noise_gamma=None, ip_noise_gamma_random_strength=False, generator=generator
    )
    with torch.no_grad():
        return predict_velocity(model, noisy, sigmas, text, 1.0), velocity_target(latents, noise)


def loss(model: Flux, held_out: tuple[Tensor, TextInputs]) -> float:
    """Over three noise levels, in which pictures take shape."""
    parts = [velocities(model, held_out, sigma) for sigma in (0.3, 0.6, 0.9)]
    return float(np.mean([(got - wanted).square().mean().item() for got, wanted in parts]))


def test_the_loss_falls_on_pictures_of_the_emblem_that_were_not_trained_on(
    demo: DemoRun, held_out: tuple[Tensor, TextInputs]
) -> None:
    before, after = loss(base(), held_out), loss(with_lora(demo.lora, 1.0), held_out)
    assert after < 0.85 * before, f"{before:.4f} -> {after:.4f}"


def test_strength_0_is_exactly_the_base(demo: DemoRun, held_out: tuple[Tensor, TextInputs]) -> None:
    assert torch.equal(velocities(with_lora(demo.lora, 0.0), held_out, 0.6)[0], velocities(base(), held_out, 0.6)[0])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_merged_lora_draws_what_an_applied_one_draws(
    demo: DemoRun, held_out: tuple[Tensor, TextInputs], strength: float
) -> None:
    merged = base()
    merge_lora(merged, demo.lora, strength)
    expected = velocities(with_lora(demo.lora, strength), held_out, 0.6)[0]
    got = velocities(merged, held_out, 0.6)[0]
    assert (got - expected).abs().max() < 1e-3
    assert (got - velocities(base(), held_out, 0.6)[0]).abs().max() > 0.1, "the LoRA must do something at all"
