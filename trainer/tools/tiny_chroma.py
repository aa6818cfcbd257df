"""A small Chroma transformer with random weights, under the published key names.

Like the small FLUX.1 it maps a latent token into its hidden space and back, so that a LoRA on the blocks lowers the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.tools.tiny_networks import default_axes_dim, orthogonal_columns
from trainer.tools.tiny_weights import StorageType, Weights, linear, ones, write_safetensors, zeros


def make_chroma(
    path: Path,
    *,
    hidden: int = 96,
    heads: int = 4,
    depth: int = 2,
    depth_single: int = 4,
    context_in_dim: int = 64,
    axes_dim: Sequence[int] | None = None,
    in_channels: int = 64,
    mlp_ratio: float = 4.0,
    theta: int = 10_000,
    approximator_in_dim: int = 64,
    approximator_hidden: int = 64,
    approximator_depth: int = 5,
    dtype: StorageType = "bf16",
    seed: int = 5,
) -> Path:
    """Write a Chroma transformer. Returns `path`. `axes_dim` as for `make_flux`; `approximator_in_dim` is a multiple of 8."""
    if hidden % heads or approximator_in_dim % 8:
        raise ValueError("hidden must be a multiple of heads, and approximator_in_dim of 8")
    head_dim = hidden // heads
    axes = list(axes_dim) if axes_dim is not None else default_axes_dim(head_dim)
    if sum(axes) != head_dim or any(size % 2 or size < 0 for size in axes):
        raise ValueError(f"axes_dim {axes} must be even numbers that add up to hidden / heads = {head_dim}")

    rng = np.random.default_rng(seed)
    mlp = int(hidden * mlp_ratio)
    w: Weights = {}
    basis = orthogonal_columns(rng, hidden, in_channels)
    w["img_in.weight"] = basis * np.float32(math.sqrt(hidden / in_channels))
    w["img_in.bias"] = zeros(hidden)
    linear(w, rng, "txt_in", context_in_dim, hidden)

    approximator = "distilled_guidance_layer"
    linear(w, rng, f"{approximator}.in_proj", approximator_in_dim, approximator_hidden, gain=1.5)
    for index in range(approximator_depth):
        linear(w, rng, f"{approximator}.layers.{index}.in_layer", approximator_hidden, approximator_hidden)
        linear(w, rng, f"{approximator}.layers.{index}.out_layer", approximator_hidden, approximator_hidden)
        w[f"{approximator}.norms.{index}.scale"] = ones(approximator_hidden)
    linear(w, rng, f"{approximator}.out_proj", approximator_hidden, hidden, gain=0.3)

    for index in range(depth):
        block = f"double_blocks.{index}"
        for stream in ("img", "txt"):
            linear(w, rng, f"{block}.{stream}_attn.qkv", hidden, 3 * hidden)
            w[f"{block}.{stream}_attn.norm.query_norm.scale"] = ones(head_dim)
            w[f"{block}.{stream}_attn.norm.key_norm.scale"] = ones(head_dim)
            linear(w, rng, f"{block}.{stream}_attn.proj", hidden, hidden)
            linear(w, rng, f"{block}.{stream}_mlp.0", hidden, mlp)
            linear(w, rng, f"{block}.{stream}_mlp.2", mlp, hidden)
    for index in range(depth_single):
        block = f"single_blocks.{index}"
        linear(w, rng, f"{block}.linear1", hidden, 3 * hidden + mlp)
        linear(w, rng, f"{block}.linear2", hidden + mlp, hidden)
        w[f"{block}.norm.query_norm.scale"] = ones(head_dim)
        w[f"{block}.norm.key_norm.scale"] = ones(head_dim)
    w["final_layer.linear.weight"] = basis.T * np.float32(0.7 * math.sqrt(in_channels / hidden))
    w["final_layer.linear.bias"] = zeros(in_channels)
    write_safetensors(path, w, dtype=dtype, config={"axes_dim": axes, "theta": theta})
    return path
