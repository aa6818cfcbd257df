"""Trains the demo's autoencoder: the FLUX.1 structure, narrow, on pictures of the demo's world.

B batch, C channels, H W picture size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.model.autoencoder import AutoEncoder
from trainer.schema.checkpoint_header import AutoencoderParams
from trainer.tools.tiny_weights import write_safetensors
from trainer.tools.training_state import TrainingState
from trainer.tools.world import SIDE, draw_medley, draw_scene, random_scene

PARAMS: Final = AutoencoderParams(
    resolution=SIDE, in_channels=3, ch=32, out_ch=3, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=16
)
BATCH: Final = 16
CROP: Final = 48
PEAK_RATE: Final = 1.5e-3
POLISH_RATE: Final = 1e-3
LATENT_NOISE: Final = 0.05
NUM_PICTURES: Final = 6000
# Of the divergence from a unit normal, in nats per latent value. So small a part still decides the latents' scale and
# puts about a tenth of noise on them, which makes what the transformer slightly misses decode to something near.
DIVERGENCE_WEIGHT: Final = 1e-3


def world_pictures(seed: int, count: int, *, held_out: bool, with_medleys: bool) -> NDArray[np.uint8]:
    """(count, 96, 96, 3): scenes, every second one a medley if so wished."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            draw_medley(rng) if with_medleys and index % 2 else draw_scene(random_scene(rng, held_out=held_out), rng)
            for index in range(count)
        ]
    )


def to_images(pictures: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) bytes -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learn_autoencoder(folder: Path, *, seed: int, num_steps: int, report: Callable[[str], None]) -> AutoEncoder:
    """Train, or go on training from the state in `folder`; returns the model with latents of about unit spread."""
    torch.manual_seed(seed)
    model = AutoEncoder(PARAMS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    state = TrainingState(folder / "autoencoder_state.pt", model, optimizer)
    first = state.resume()
    pictures = world_pictures(seed + 1, NUM_PICTURES, held_out=False, with_medleys=True)
    for step in range(first, num_steps):
        # Everything random follows from seed and step, so that a resumed training is the same as an uninterrupted one.
        rng = np.random.default_rng((seed, step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, PEAK_RATE)
        images = to_images(_random_crops(pictures, rng))
        moments = model.encode_moments(images)
        noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=generator)
        decoded = model.decode(model.latents_from_moments(moments, noise))
        loss = reconstruction_loss(decoded, images) + DIVERGENCE_WEIGHT * _divergence(moments)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            report(f"autoencoder step {step + 1}/{num_steps} loss {loss.item():.4f}")
            state.save(step + 1)
    model.eval()
    scale_latents(model, to_images(pictures[:256:2]))
    return model


def polish_decoder(
    folder: Path, model: AutoEncoder, *, seed: int, num_steps: int, report: Callable[[str], None]
) -> None:
    """Train the decoder alone on whole pictures, or go on with it; latents stay what they are.

    Norms over a whole picture have other statistics than over the crops that are cheap to begin with. Latents are blurred
    a little with noise, as the transformer will not hit them exactly either.
    """
    decoder = model.decoder.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=POLISH_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    state = TrainingState(folder / "decoder_state.pt", decoder, optimizer)
    first = state.resume()
    pictures = world_pictures(seed + 3, NUM_PICTURES, held_out=False, with_medleys=True)
    for step in range(first, num_steps):
        rng = np.random.default_rng((seed, step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, POLISH_RATE)
        images = to_images(pictures[rng.integers(len(pictures), size=BATCH // 2)])
        with torch.no_grad():
            latents = model.encode(images, sample=False)
            latents += LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        loss = reconstruction_loss(model.decode(latents), images)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            report(f"decoder step {step + 1}/{num_steps} loss {loss.item():.4f}")
            state.save(step + 1)
    decoder.requires_grad_(False).eval()


def learning_rate(step: int, num_steps: int, peak: float, num_warmup: int = 100) -> float:
    """A linear rise, then half a cosine down to 2 % of the peak."""
    rise = min(1.0, (step + 1) / num_warmup)
    return peak * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images)


def _divergence(moments: Tensor) -> Tensor:
    mean, log_variance = moments.chunk(2, dim=1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def _random_crops(pictures: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    chosen = rng.integers(len(pictures), size=BATCH)
    corners = rng.integers(SIDE - CROP + 1, size=(BATCH, 2))
    return np.stack(
        [
            pictures[index, top : top + CROP, left : left + CROP]
            for index, (top, left) in zip(chosen, corners, strict=True)
        ]
    )


def scale_latents(model: AutoEncoder, images: Tensor) -> None:
    """Fold factors into the two layers around the latents, so that each channel of them has a spread of 1.

    The decoder sees the same as before: what the encoder's last convolution gains its own first one loses.
    """
    with torch.no_grad():
        spread = model.encode(images, sample=False).std(dim=(0, 2, 3))
        factors = 1 / spread.clamp(min=1e-3)
        last, first = model.encoder.conv_out, model.decoder.conv_in
        assert last.bias is not None
        num_means = PARAMS.z_channels
        last.weight[:num_means] *= factors[:, None, None, None]
        last.bias[:num_means] *= factors
        last.bias[num_means:] += 2 * factors.log()
        first.weight /= factors[None, :, None, None]


def signal_to_noise(model: AutoEncoder, pictures: NDArray[np.uint8]) -> float:
    """Mean PSNR in dB of the reconstructions of pictures (B, H, W, 3)."""
    with torch.no_grad():
        images = to_images(pictures)
        errors = ((model(images).clamp(-1, 1) - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * errors.log10()).mean())


def save_autoencoder(model: AutoEncoder, path: Path) -> Path:
    weights = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    config = {
        "resolution": PARAMS.resolution,
        "in_channels": PARAMS.in_channels,
        "ch": PARAMS.ch,
        "out_ch": PARAMS.out_ch,
        "ch_mult": list(PARAMS.ch_mult),
        "num_res_blocks": PARAMS.num_res_blocks,
        "z_channels": PARAMS.z_channels,
        "scale_factor": PARAMS.scale_factor,
        "shift_factor": PARAMS.shift_factor,
    }
    write_safetensors(path, weights, dtype="bf16", config=config)
    return path
