"""Trains the demo's transformer by flow matching: a FLUX.1 dev of 2.4 million parameters on the demo's world.

B batch, h w latent size, L text tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.model.autoencoder import AutoEncoder
from trainer.model.flux import Flux
from trainer.model.layers import Modulation
from trainer.schema.checkpoint_header import FluxParams
from trainer.tools.demo_encoders import POOLED_WIDTH, TEXT_WIDTH, CaptionEncoder
from trainer.tools.learn_autoencoder import learning_rate, to_images
from trainer.tools.tiny_networks import default_axes_dim
from trainer.tools.tiny_weights import write_safetensors
from trainer.tools.training_state import TrainingState
from trainer.tools.world import draw_scene, random_caption, random_scene
from trainer.train.conditioning import TextInputs
from trainer.train.flow import add_noise, sample_sigmas, velocity_target
from trainer.train.objective import predict_velocity

PARAMS: Final = FluxParams(
    in_channels=64,
    out_channels=64,
    vec_in_dim=POOLED_WIDTH,
    context_in_dim=TEXT_WIDTH,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=4,
    axes_dim=tuple(default_axes_dim(64)),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=True,
)
_Item = TypeVar("_Item")

BATCH: Final = 64
PEAK_RATE: Final = 1.5e-3
NUM_PICTURES: Final = 12_000
CAPTIONS_EACH: Final = 3
SHIFTS: Final = (1.6, 6.0)
"""Of the noise levels in the two halves of a batch. The first is about that of `flux_shift` at this picture size."""

DROPOUT: Final = 0.1
"""Part of the captions that are left empty."""
AVERAGE_DECAY: Final = 0.999
GUIDANCE: Final = (1.0, 4.0)
"""The transformer meets all these values and learns that they mean nothing here."""


@dataclass(frozen=True)
class Lessons:
    """What the transformer learns from: latents' `mean` and `deviation` (P, 16, h, w), captions encoded once each as
    `txt` (Q, L, D) and `vec` (Q, C), and for each picture the rows of its captions (P, 3). Row 0 is the empty caption.
    """

    mean: Tensor
    deviation: Tensor
    txt: Tensor
    vec: Tensor
    rows: NDArray[np.int64]


def make_lessons(
    autoencoder: AutoEncoder, encode: CaptionEncoder, *, seed: int, report: Callable[[str], None]
) -> Lessons:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, held_out=False) for _ in range(NUM_PICTURES)]
    captions = [[random_caption(scene, rng) for _ in range(CAPTIONS_EACH)] for scene in scenes]
    known = {"": 0}
    rows = np.array([[known.setdefault(caption, len(known)) for caption in row] for row in captions], dtype=np.int64)
    texts = [encode(part) for part in _parts(list(known), 512)]
    report(f"{NUM_PICTURES} pictures with {len(known) - 1} different captions")
    means: list[Tensor] = []
    deviations: list[Tensor] = []
    for part in _parts(scenes, 50):
        images = to_images(np.stack([draw_scene(scene, rng) for scene in part]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = autoencoder.encode_moments(images).float().chunk(2, dim=1)
        params = autoencoder.params
        means.append((params.scale_factor * (mean - params.shift_factor)).half())
        deviations.append((params.scale_factor * torch.exp(0.5 * log_variance)).half())
    return Lessons(
        torch.cat(means),
        torch.cat(deviations),
        torch.cat([text.txt for text in texts]),
        torch.cat([text.vec for text in texts]),
        rows,
    )


def _parts(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def learn_flux(
    folder: Path,
    make: Callable[[], Lessons],
    *,
    seed: int,
    num_steps: int,
    report: Callable[[str], None],
) -> Flux:
    """Train, or go on training from the state in `folder`; returns the average over the last thousand steps or so."""
    torch.manual_seed(seed)
    model = Flux(PARAMS)
    _initialise(model)
    model.requires_grad_(True)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    state = TrainingState(folder / "flux_state.pt", model, optimizer, average)
    first = state.resume()
    if first >= num_steps:
        return average.eval()
    lessons = make()
    losses: list[float] = []
    for step in range(first, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, PEAK_RATE)
        loss = _step_loss(model, lessons, np.random.default_rng((seed, step)), seed * 1_000_003 + step)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            report(f"flux step {step + 1}/{num_steps} loss {np.mean(losses[-100:]):.4f}")
            state.save(step + 1)
    return average.eval()


def _step_loss(model: Flux, lessons: Lessons, rng: np.random.Generator, seed: int) -> Tensor:
    """The flow matching loss of one random batch; everything random follows from the two last arguments."""
    generator = torch.Generator().manual_seed(seed)
    chosen = rng.integers(len(lessons.rows), size=BATCH)
    rows = lessons.rows[chosen, rng.integers(CAPTIONS_EACH, size=BATCH)]
    rows = torch.from_numpy(np.where(rng.random(BATCH) < DROPOUT, 0, rows))
    picked = torch.from_numpy(chosen)
    mean, deviation = lessons.mean[picked].float(), lessons.deviation[picked].float()
    latents = mean + deviation * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = _noise_levels(generator)
    noisy = add_noise(
        latents, noise, sigmas, ip_noise_gamma=None, ip_noise_gamma_random_strength=False, generator=generator
    )
    text = TextInputs(lessons.txt[rows], lessons.vec[rows], None)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = predict_velocity(model, noisy, sigmas, text, float(rng.uniform(*GUIDANCE)))
    return F.mse_loss(velocity.float(), velocity_target(latents, noise))


def _noise_levels(generator: torch.Generator) -> Tensor:
    """(B,): half as FLUX is usually trained, half close to pure noise.

    Which shape it will be is decided before it can be seen, so only there does the word for it have to be read.
    """
    return torch.cat(
        [
            sample_sigmas(
                "shift",
                BATCH // 2,
                latent_height=0,
                latent_width=0,
                sigmoid_scale=1.0,
                discrete_flow_shift=shift,
                weighting_scheme="none",
                logit_mean=0.0,
                logit_std=1.0,
                mode_scale=1.29,
                generator=generator,
            )
            for shift in SHIFTS
        ]
    )


def _initialise(model: Flux) -> None:
    """Every block begins as the identity and the output as 0 (Peebles and Xie, 2022, arXiv:2212.09748)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.lin.weight)
    nn.init.zeros_(model.final_layer.linear.weight)
    for parameter in model.final_layer.adaLN_modulation.parameters():
        nn.init.zeros_(parameter)


def save_flux(model: Flux, path: Path) -> Path:
    weights = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    config = {
        "in_channels": PARAMS.in_channels,
        "vec_in_dim": PARAMS.vec_in_dim,
        "context_in_dim": PARAMS.context_in_dim,
        "hidden_size": PARAMS.hidden_size,
        "mlp_ratio": PARAMS.mlp_ratio,
        "num_heads": PARAMS.num_heads,
        "depth": PARAMS.depth,
        "depth_single_blocks": PARAMS.depth_single_blocks,
        "axes_dim": list(PARAMS.axes_dim),
        "theta": PARAMS.theta,
        "qkv_bias": PARAMS.qkv_bias,
        "guidance_embed": PARAMS.guidance_embed,
    }
    write_safetensors(path, weights, dtype="bf16", config=config)
    return path
