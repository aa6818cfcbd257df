"""The autoencoder in strips of rows: the same pictures and latents, in less memory, as the estimate says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.live_bytes import peak_bytes
from trainer.model import strips
from trainer.model.autoencoder import AutoEncoder
from trainer.model.weights import load_autoencoder
from trainer.schema import memory_phases
from trainer.schema.memory import estimate
from trainer.schema.options import Options
from trainer.schema.parameter_counts import (
    PUBLISHED_AUTOENCODER,
    PUBLISHED_CLIP,
    PUBLISHED_DEV,
    PUBLISHED_T5,
    OtherModels,
)


@pytest.mark.parametrize("values", [200, 3000, 20_000])
@pytest.mark.parametrize("size", [(48, 32), (40, 72)])
def test_strips_change_only_the_rounding(
    golden: Path, monkeypatch: pytest.MonkeyPatch, values: int, size: tuple[int, int]
) -> None:
    autoencoder = load_autoencoder(golden / "model_ae.safetensors", torch.float32, "cpu")
    images = torch.rand((2, 3, *size), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        moments = autoencoder.encode_moments(images)
        latents = autoencoder.latents_from_moments(moments, None)
        pictures = autoencoder.decode(latents)
        monkeypatch.setattr(strips, "STRIP_VALUES", values)
        in_strips = autoencoder.encode_moments(images), autoencoder.decode(latents)
    for found, expected in zip(in_strips, (moments, pictures), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
        assert not torch.equal(found, expected), "strips sum in another order: nothing was computed in strips"


def test_what_is_learnt_has_its_gradients(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = load_autoencoder(golden / "model_ae.safetensors", torch.float32, "cpu")
    monkeypatch.setattr(strips, "STRIP_VALUES", 200)
    latents = torch.zeros(1, 16, 4, 4, requires_grad=True)
    autoencoder.decode(latents).sum().backward()
    assert latents.grad is not None


def test_memory_of_coding_is_what_the_estimate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    values, side = 1 << 14, 128
    for module in (strips, memory_phases):
        monkeypatch.setattr(module, "STRIP_VALUES", values)
    params = dataclasses.replace(PUBLISHED_AUTOENCODER, ch=32, num_res_blocks=1)
    coder = AutoEncoder(params).requires_grad_(False).eval()
    options = Options.model_validate({"device": "cpu", "mixed_precision": "no", "cache_latents": True})
    models = OtherModels(PUBLISHED_T5, PUBLISHED_CLIP, params)
    images, latents = torch.zeros(1, 3, side, side), torch.zeros(1, 16, side // 8, side // 8)
    result = estimate(PUBLISHED_DEV, options, width=side, height=side, batch_size=1, models=models)
    phase = next(phase for phase in result.phases if phase.name == "latents")
    promised = sum(part.bytes for part in phase.parts if part.name == "autoencoder activations")
    found = peak_bytes(lambda: coder.encode_moments(images))
    assert found <= promised < 1.6 * found
    unit = 32 * side * side * 4
    decoding = peak_bytes(lambda: coder.decode(latents))
    assert decoding <= 4 * unit + 24 * values
    monkeypatch.setattr(strips, "STRIP_VALUES", 1 << 30)
    assert peak_bytes(lambda: coder.decode(latents)) > 1.3 * decoding
