"""Sample pictures: the noise schedule, and Euler's way from noise to a picture.

The schedule is that of black-forest-labs/flux (`sampling.py`).

B batch, h w latent size (1/8 of the picture's).
"""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer.schema.base import UserError
from trainer.train.checkpoint import write_file
from trainer.train.conditioning import TextInputs
from trainer.train.flow import mu_for_tokens, shift_sigmas
from trainer.train.sample_prompts import SIZE_STEP, USUAL_GUIDANCE, SamplePrompt

LATENT_CHANNELS, PIXELS_PER_LATENT = 16, 8


class VelocityModel(Protocol):
    """The model's velocity for latents (B, 16, h, w) at timesteps (B,) in [0, 1]; the same shape as the latents."""

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextInputs, guidance_scale: float, /) -> Tensor: ...


def sample_schedule(num_steps: int, num_tokens: int, *, is_shifted: bool) -> Tensor:
    """Timesteps from 1 to 0, (num_steps + 1,) float32, for a picture of `num_tokens` image tokens.

    dev is made with the shift to high noise that grows with the picture; schnell without. (The reference shifts both.)
    """
    levels = torch.linspace(1, 0, num_steps + 1)
    return shift_sigmas(levels, math.exp(mu_for_tokens(num_tokens))) if is_shifted else levels


def initial_noise(prompt: SamplePrompt, seed: int) -> Tensor:
    """Latent noise (1, 16, h, w), float32 on the host: the same picture from the same seed on every device."""
    shape = (1, LATENT_CHANNELS, prompt.height // PIXELS_PER_LATENT, prompt.width // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_sample(
    prompt: SamplePrompt,
    *,
    seed: int,
    predict: VelocityModel,
    decode: Callable[[Tensor], Tensor],
    text: TextInputs,
    negative_text: TextInputs | None,
    is_schnell: bool,
    device: torch.device,
    progress: Callable[[int, int], None],
    check_commands: Callable[[], None],
) -> Image.Image:
    """The picture of `prompt`.

    `text` and `negative_text` are encodings of batch 1; the second is needed when the prompt uses its negative prompt.
    `predict` and `decode` (latents (1, 16, h, w) to images (1, 3, H, W) about [-1, 1]) bring their own autocast; the
    model is in evaluation mode. After each step `progress(done, total)` and `check_commands()` are called, and either
    may raise to leave. Global random state is not touched.
    """
    num_tokens = (prompt.height // SIZE_STEP) * (prompt.width // SIZE_STEP)
    schedule = sample_schedule(prompt.num_steps, num_tokens, is_shifted=not is_schnell).tolist()
    latents = initial_noise(prompt, seed).to(device)
    guidance_scale = USUAL_GUIDANCE if prompt.guidance_scale is None else prompt.guidance_scale
    joint = text
    if prompt.uses_negative_prompt:
        if negative_text is None:
            raise ValueError("the prompt uses its negative prompt; its encoding is needed")
        joint = _stack(text, negative_text)
    with torch.no_grad():
        for step, (timestep, next_timestep) in enumerate(itertools.pairwise(schedule), 1):
            batch = latents.expand(joint.txt.shape[0], -1, -1, -1)
            timesteps = torch.full((batch.shape[0],), timestep, device=device)
            velocity = predict(batch, timesteps, joint, guidance_scale).float()
            if prompt.uses_negative_prompt:
                wanted, unwanted = velocity.chunk(2)
                velocity = unwanted + prompt.cfg_scale * (wanted - unwanted)
            latents = latents + (next_timestep - timestep) * velocity
            progress(step, prompt.num_steps)
            check_commands()
        return to_picture(decode(latents)[0])


def _stack(first: TextInputs, second: TextInputs) -> TextInputs:
    """Both as one batch. With the text mask each has its own length; the shorter one is padded, and the padding hidden."""
    longest = max(first.txt.shape[1], second.txt.shape[1])
    txt = torch.cat([F.pad(text.txt, (0, 0, 0, longest - text.txt.shape[1])) for text in (first, second)])
    mask = torch.cat([F.pad(_mask_of(text), (0, longest - text.txt.shape[1])) for text in (first, second)])
    return TextInputs(txt, torch.cat((first.vec, second.vec)), None if bool(mask.all()) else mask)


def _mask_of(text: TextInputs) -> Tensor:
    return torch.ones(text.txt.shape[:2], dtype=torch.int64, device=text.txt.device) if text.mask is None else text.mask


def to_picture(image: Tensor) -> Image.Image:
    """An RGB picture from an image (3, H, W) about [-1, 1]; values beyond are clipped.

    Raises `UserError` when the image holds NaN or infinity: the models' number format cannot hold what they compute.
    """
    image = image.detach().float()
    if not torch.isfinite(image).all():
        raise UserError(
            "a sample picture came out as NaN",
            hint="The LoRA has left the range of numbers (look at the loss, lower the rate), or a model file is damaged.",
        )
    # Truncated, not rounded, as the reference does it.
    values = ((image.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()))


def sample_file_name(
    output_name: str | None, *, step: int, epoch: int | None, index: int, moment: float, seed: int | None
) -> str:
    """The picture's name: X_e000001_02_20260114203112_42.png after an epoch, X_000500_... after a step.

    `epoch` None means a sample after a step. `moment` is in seconds since 1970; parts that are None are left out.
    """
    parts = (
        output_name,
        f"{step:06d}" if epoch is None else f"e{epoch:06d}",
        f"{index:02d}",
        time.strftime("%Y%m%d%H%M%S", time.localtime(moment)),
        None if seed is None else str(seed),
    )
    return "_".join(part for part in parts if part) + ".png"


def save_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG that is whole or absent. Raises `UserError` when the disk does not take it."""
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    write_file(path, encoded.getvalue())
