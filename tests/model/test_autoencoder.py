"""The autoencoder's own promises; its numbers are in tests/parity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.model.autoencoder import AutoEncoder
from trainer.model.weights import load_autoencoder


@pytest.fixture(scope="module")
def autoencoder(golden: Path) -> AutoEncoder:
    return load_autoencoder(golden / "model_ae.safetensors", torch.float32, "cpu")


def test_sampling_follows_the_generator(autoencoder: AutoEncoder) -> None:
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        first = autoencoder.encode(image, torch.Generator().manual_seed(1))
        again = autoencoder.encode(image, torch.Generator().manual_seed(1))
        other = autoencoder.encode(image, torch.Generator().manual_seed(2))
        mean = autoencoder.encode(image, sample=False)
    assert first.shape == (1, 16, 4, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, mean)


def test_sampled_latents_scatter_about_the_mean_by_the_deviation(autoencoder: AutoEncoder) -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        moments = autoencoder.encode_moments(image)
        samples = torch.cat([autoencoder.encode(image, generator) for _ in range(400)])
        mean = autoencoder.encode(image, sample=False)[0]
    deviation = 0.3611 * torch.exp(0.5 * moments[0, 16:])
    assert ((samples.mean(0) - mean).abs() / deviation).max() < 0.3
    assert (samples.std(0) / deviation - 1).abs().max() < 0.25


def test_image_to_latent_size(autoencoder: AutoEncoder) -> None:
    assert autoencoder.downscale == 8


def test_images_are_cast_to_the_type_of_the_weights(golden: Path) -> None:
    rounded = load_autoencoder(golden / "model_ae.safetensors", torch.bfloat16, "cpu")
    with torch.no_grad():
        latents = rounded.encode(torch.zeros(1, 3, 16, 16), sample=False)
        assert latents.dtype == torch.bfloat16
        assert rounded.decode(latents.float()).shape == (1, 3, 16, 16)
