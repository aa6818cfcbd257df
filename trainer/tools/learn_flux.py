"""Trains the demo's transformer by flow matching: a FLUX.1 dev of 2.4 million parameters on the demo's world.

B batch, h w latent size, L text tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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

NUM_PICTURES: Final = 12_000
CAPTIONS_EACH: Final = 3
SHIFTS: Final = (1.6, 6.0)
"""Of the lower and the higher noise levels in a batch. The first is about that of `flux_shift` at this picture size."""

DROPOUT: Final = 0.1
"""Part of the captions that are left empty."""


@dataclass(frozen=True)
class Course:
    """One way of training. `high_part` of each batch is close to pure noise: `SHIFTS[1]` instead of `SHIFTS[0]`.

    Which shape it will be is decided before it can be seen, so only there does the word for it have to be read. `guidance`
    is the range of the guidance scales that the transformer meets; what it makes of them is what it is taught.
    """

    name: str
    batch: int
    peak_rate: float
    num_warmup: int
    high_part: float
    average_decay: float
    guidance: tuple[float, float]


FIRST: Final = Course("flux", 64, 1.5e-3, 100, 0.5, 0.999, (1.0, 4.0))
"""From nothing. Guidance scales mean nothing yet."""

FINE: Final = Course("flux, high noise", 48, 6e-4, 50, 2 / 3, 0.998, (1.0, 4.0))
"""Two thirds of the levels where shapes are decided, which is what the first course is slowest at."""

GUIDED: Final = Course("flux, guidance", 48, 5e-4, 30, 0.5, 0.995, (1.0, 5.0))
"""The transformer learns from its own former self what guidance with the empty caption does, at any scale, in one
evaluation: guidance distillation (Meng et al., 2022, arXiv:2210.03142), as FLUX.1 dev is made."""

_PLAIN_PART: Final = 0.25
"""Of the pictures in the guided course, which have guidance 1: what a LoRA is trained with."""


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
        with torch.no_grad(), half_precision():
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
    num_steps: tuple[int, int, int],
    report: Callable[[str], None],
) -> Flux:
    """The three courses with their numbers of steps, going on from the states in `folder` if there are any.

    Returns the average over the last hundreds of steps. `make` is called once, if anything is left to be learned.
    """
    torch.manual_seed(seed)
    model = Flux(PARAMS)
    _initialise(model)
    lessons = functools.cache(make)
    for number, (course, steps) in enumerate(zip((FIRST, FINE, GUIDED), num_steps, strict=True)):
        teacher = copy.deepcopy(model).requires_grad_(False).eval() if course is GUIDED else None
        state = folder / f"flux_state_{number + 1}.pt"
        model = _take(course, model, teacher, lessons, state, seed=seed + 10 * number, num_steps=steps, report=report)
    return model.eval()


def _take(
    course: Course,
    model: Flux,
    teacher: Flux | None,
    lessons: Callable[[], Lessons],
    path: Path,
    *,
    seed: int,
    num_steps: int,
    report: Callable[[str], None],
) -> Flux:
    """Take a course, or the rest of it; `model` is trained, its average is returned."""
    model.requires_grad_(True).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    state = TrainingState(path, model, optimizer, average)
    losses: list[float] = []
    for step in range(state.resume(), num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, course.peak_rate, course.num_warmup)
        loss = step_loss(
            course, model, teacher, lessons(), np.random.default_rng((seed, step)), seed * 1_000_003 + step
        )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(course.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            report(f"{course.name} step {step + 1}/{num_steps} loss {np.mean(losses[-100:]):.4f}")
            state.save(step + 1)
    return average


def step_loss(
    course: Course, model: Flux, teacher: Flux | None, lessons: Lessons, rng: np.random.Generator, seed: int
) -> Tensor:
    """The loss of one random batch; everything random follows from the two last arguments.

    Without a teacher it is flow matching's. With one, the target is its guided velocity u + g (c - u) of the velocities
    with the caption, c, and with the empty one, u. Pictures weigh 1 / g, which keeps large scales from ruling.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = rng.integers(len(lessons.rows), size=course.batch)
    rows = lessons.rows[chosen, rng.integers(CAPTIONS_EACH, size=course.batch)]
    rows = torch.from_numpy(np.where(rng.random(course.batch) < DROPOUT, 0, rows))
    picked = torch.from_numpy(chosen)
    mean, deviation = lessons.mean[picked].float(), lessons.deviation[picked].float()
    latents = mean + deviation * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = _noise_levels(course, generator)
    noisy = add_noise(
        latents, noise, sigmas, ip_noise_gamma=None, ip_noise_gamma_random_strength=False, generator=generator
    )
    text = TextInputs(lessons.txt[rows], lessons.vec[rows], None)
    scales = rng.uniform(*course.guidance, course.batch)
    if teacher is None:
        with half_precision():
            velocity = predict_velocity(model, noisy, sigmas, text, torch.from_numpy(scales))
        return F.mse_loss(velocity.float(), velocity_target(latents, noise))
    guidance = torch.from_numpy(np.where(rng.random(course.batch) < _PLAIN_PART, 1.0, scales)).float()
    empty = TextInputs(lessons.txt[:1].expand_as(text.txt), lessons.vec[:1].expand_as(text.vec), None)
    with half_precision():
        with torch.no_grad():
            with_caption = predict_velocity(teacher, noisy, sigmas, text, 1.0)
            without = predict_velocity(teacher, noisy, sigmas, empty, 1.0)
        velocity = predict_velocity(model, noisy, sigmas, text, guidance)
    target = without.float() + guidance[:, None, None, None] * (with_caption - without).float()
    return ((velocity.float() - target).square().mean(dim=(1, 2, 3)) / guidance).mean()


def half_precision() -> AbstractContextManager[object]:
    """bf16 where the processor multiplies it; elsewhere it is emulated, many times slower than fp32."""
    if torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def _noise_levels(course: Course, generator: torch.Generator) -> Tensor:
    """(B,): the lower ones as FLUX is usually trained, the higher ones close to pure noise."""
    num_high = int(course.batch * course.high_part)
    return torch.cat(
        [
            sample_sigmas(
                "shift",
                count,
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
            for shift, count in zip(SHIFTS, (course.batch - num_high, num_high), strict=True)
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
