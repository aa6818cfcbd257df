"""How fast pictures and captions are encoded, and what that takes, with random weights."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from tests.bench.full_size import DEVIATION, Random, timed
from trainer.model.autoencoder import AutoEncoder
from trainer.model.text_encoders import encode_t5
from trainer.model.weights import empty_t5xxl
from trainer.schema.checkpoint_header import AutoencoderParams, T5Params

TIMED = 3


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter of a model on the meta device random values; frozen."""
    draw = Random(device)
    values: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in values:
                value = draw(tuple(parameter.shape), dtype).mul_(DEVIATION)
                values[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(module, name, values[id(parameter)])
    model.eval()


def measure_phases(
    device: torch.device,
    dtype: torch.dtype,
    *,
    autoencoder: AutoencoderParams,
    t5: T5Params,
    is_tiny: bool,
    side: int,
) -> list[str]:
    """A Markdown table: seconds of one picture or caption, and the most memory beside what was there before."""
    length = 8 if is_tiny else 512
    if is_tiny:
        autoencoder = replace(autoencoder, ch=32, ch_mult=(1, 1), num_res_blocks=1)
        t5 = T5Params(32, 48, 8, 4, 2, 64, 8)
    lines = ["| phase | seconds each | a minute | peak GB |", "|---|---|---|---|"]

    def measure(what: str, work: Callable[[], object]) -> None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            try:
                list(timed(work, device, 1))
                seconds = statistics.median(timed(work, device, TIMED))
            except torch.OutOfMemoryError:
                lines.append(f"| {what} | out of memory | | |")
                return
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if device.type == "cuda" else "-"
        lines.append(f"| {what} | {seconds:.3f} | {60 / seconds:.0f} | {peak} |")

    _with_autoencoder(autoencoder, device, dtype, side, measure)
    gc.collect()
    with torch.device("meta"):
        encoder = empty_t5xxl(t5)
    encoder.encoder.embed_tokens = encoder.shared
    fill(encoder, device, dtype)
    ids = torch.ones(1, length, dtype=torch.int64, device=device)
    measure(
        f"caption of {length} tokens by T5", lambda: encode_t5(encoder, ids, torch.ones_like(ids), apply_mask=False)
    )
    return [*lines, ""]


def _with_autoencoder(
    params: AutoencoderParams,
    device: torch.device,
    dtype: torch.dtype,
    side: int,
    measure: Callable[[str, Callable[[], object]], None],
) -> None:
    with torch.device("meta"):
        coder = AutoEncoder(params)
    fill(coder, device, dtype)
    draw, small = Random(device), side // coder.downscale
    pixels, latents = draw((1, 3, side, side), dtype), draw((1, params.z_channels, small, small), dtype)
    measure(f"picture of {side} px to latents", lambda: coder.encode_moments(pixels))
    measure(f"latents to picture of {side} px", lambda: coder.decode(latents))
