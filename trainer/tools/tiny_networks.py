"""Small FLUX.1 transformers and text encoders with random weights, under the published key names.

FLUX maps a latent token into its hidden space and back through random blocks of modest gain, so that a LoRA on the
blocks lowers the loss from the first steps on. The text encoders have the usual initialisation and tell captions apart.
Sizes that shapes alone do not show stand in the file's safetensors metadata under the key ``config`` as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.tools.tiny_tokenizers import clip_vocab_size, t5_vocab_size
from trainer.tools.tiny_weights import StorageType, Weights, linear, norm, normal, ones, write_safetensors, zeros

_SURE = 12.0
"""A score that leaves almost no attention for others."""


def make_flux(
    path: Path,
    *,
    hidden: int = 96,
    heads: int = 4,
    depth: int = 2,
    depth_single: int = 4,
    guidance: bool = True,
    context_in_dim: int = 64,
    vec_in_dim: int = 32,
    axes_dim: Sequence[int] | None = None,
    in_channels: int = 64,
    mlp_ratio: float = 4.0,
    theta: int = 10_000,
    dtype: StorageType = "bf16",
    seed: int = 1,
) -> Path:
    """Write a FLUX.1 transformer: dev-like with `guidance`, schnell-like without. Returns `path`.

    `axes_dim` are the rotary dimensions of the (zero, row, column) axes; each is even and together they make
    `hidden / heads`. Left out, they follow the published proportions (1/8 and the rest halved), rounded to even numbers.
    """
    if hidden % heads:
        raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads})")
    head_dim = hidden // heads
    axes = list(axes_dim) if axes_dim is not None else default_axes_dim(head_dim)
    if sum(axes) != head_dim or any(size % 2 or size < 0 for size in axes):
        raise ValueError(f"axes_dim {axes} must be even numbers that add up to hidden / heads = {head_dim}")

    rng = np.random.default_rng(seed)
    mlp = int(hidden * mlp_ratio)
    w: Weights = {}

    # A token enters and leaves the hidden space through the same orthogonal directions; the noisy latents are then
    # visible at the output, and what the blocks add is a moderate correction for a LoRA to shape.
    basis = orthogonal_columns(rng, hidden, in_channels)
    w["img_in.weight"] = basis * np.float32(math.sqrt(hidden / in_channels))
    w["img_in.bias"] = zeros(hidden)
    linear(w, rng, "txt_in", context_in_dim, hidden)
    for name, size in (("time_in", 256), ("vector_in", vec_in_dim), ("guidance_in", 256)):
        if name == "guidance_in" and not guidance:
            continue
        linear(w, rng, f"{name}.in_layer", size, hidden, gain=1.5)
        linear(w, rng, f"{name}.out_layer", hidden, hidden, gain=1.5)

    for index in range(depth):
        block = f"double_blocks.{index}"
        for stream in ("img", "txt"):
            linear(w, rng, f"{block}.{stream}_mod.lin", hidden, 6 * hidden, gain=0.4)
            linear(w, rng, f"{block}.{stream}_attn.qkv", hidden, 3 * hidden)
            w[f"{block}.{stream}_attn.norm.query_norm.scale"] = ones(head_dim)
            w[f"{block}.{stream}_attn.norm.key_norm.scale"] = ones(head_dim)
            linear(w, rng, f"{block}.{stream}_attn.proj", hidden, hidden)
            linear(w, rng, f"{block}.{stream}_mlp.0", hidden, mlp)
            linear(w, rng, f"{block}.{stream}_mlp.2", mlp, hidden)

    for index in range(depth_single):
        block = f"single_blocks.{index}"
        linear(w, rng, f"{block}.modulation.lin", hidden, 3 * hidden, gain=0.4)
        linear(w, rng, f"{block}.linear1", hidden, 3 * hidden + mlp)
        linear(w, rng, f"{block}.linear2", hidden + mlp, hidden)
        w[f"{block}.norm.query_norm.scale"] = ones(head_dim)
        w[f"{block}.norm.key_norm.scale"] = ones(head_dim)

    linear(w, rng, "final_layer.adaLN_modulation.1", hidden, 2 * hidden, gain=0.1)
    w["final_layer.linear.weight"] = basis.T * np.float32(0.7 * math.sqrt(in_channels / hidden))
    w["final_layer.linear.bias"] = zeros(in_channels)

    config = {
        "in_channels": in_channels,
        "vec_in_dim": vec_in_dim,
        "context_in_dim": context_in_dim,
        "hidden_size": hidden,
        "mlp_ratio": mlp_ratio,
        "num_heads": heads,
        "depth": depth,
        "depth_single_blocks": depth_single,
        "axes_dim": axes,
        "theta": theta,
        "qkv_bias": True,
        "guidance_embed": guidance,
    }
    write_safetensors(path, w, dtype=dtype, config=config)
    return path


def default_axes_dim(head_dim: int) -> list[int]:
    """Rotary dimensions for a head of `head_dim` features, in the published proportions: (16, 56, 56) for 128."""
    if head_dim % 2:
        raise ValueError(f"the head dimension ({head_dim}) must be even")
    half = head_dim // 2  # counted in pairs, because a rotation takes two features
    first = half // 8
    if (half - first) % 2:
        first += 1
    rest = (half - first) // 2
    return [2 * first, 2 * rest, 2 * rest]


def orthogonal_columns(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    """(rows, columns) with orthonormal columns, or orthonormal rows when there are fewer rows than columns."""
    tall = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0].astype(np.float32)
    return tall if rows >= columns else np.ascontiguousarray(tall.T)


def make_clip_l(
    path: Path,
    *,
    hidden: int = 32,
    heads: int = 4,
    layers: int = 2,
    intermediate: int | None = None,
    vocab_size: int | None = None,
    max_positions: int = 77,
    position_std: float = 0.2,
    query_gain: float = 1.0,
    attention_gain: float = 1.0,
    mlp_gain: float = 1.0,
    dtype: StorageType = "bf16",
    seed: int = 3,
) -> Path:
    """Write a CLIP-L text encoder (transformers key names with the ``text_model.`` prefix). Returns `path`.

    `vocab_size` defaults to that of the tokenizer which `make_tokenizers` writes. The gains say how unevenly a token
    attends (small: the end token gathers all words alike), and how much attention and MLP add to it.
    """
    rng = np.random.default_rng(seed)
    wide = intermediate or 2 * hidden
    num_tokens = vocab_size or clip_vocab_size()
    w: Weights = {
        "text_model.embeddings.token_embedding.weight": normal(rng, num_tokens, hidden, std=1.0),
        "text_model.embeddings.position_embedding.weight": normal(rng, max_positions, hidden, std=position_std),
    }
    for index in range(layers):
        layer = f"text_model.encoder.layers.{index}"
        gains = {"q_proj": query_gain, "k_proj": query_gain, "v_proj": 1.0, "out_proj": attention_gain}
        for name, gain in gains.items():
            linear(w, rng, f"{layer}.self_attn.{name}", hidden, hidden, gain=gain)
        norm(w, f"{layer}.layer_norm1", hidden)
        linear(w, rng, f"{layer}.mlp.fc1", hidden, wide)
        linear(w, rng, f"{layer}.mlp.fc2", wide, hidden, gain=mlp_gain)
        norm(w, f"{layer}.layer_norm2", hidden)
    norm(w, "text_model.final_layer_norm", hidden)
    config = {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": num_tokens,
        "max_position_embeddings": max_positions,
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,  # as published: the pooled token is then found as the one with the highest id
        "hidden_act": "quick_gelu",
    }
    write_safetensors(path, w, dtype=dtype, config=config)
    return path


def make_t5xxl(
    path: Path,
    *,
    d_model: int = 64,
    d_ff: int | None = None,
    d_kv: int = 16,
    heads: int = 4,
    layers: int = 2,
    vocab_size: int | None = None,
    neighbours: Sequence[int] | None = None,
    attention_gain: float = 1.0,
    mlp_gain: float = 1.0,
    dtype: StorageType = "bf16",
    seed: int = 4,
) -> Path:
    """Write a T5 v1.1 encoder (transformers key names, gated GELU). Returns `path`.

    `vocab_size` defaults to that of the tokenizer which `make_tokenizers` writes. Like the published single-file
    encoders it holds the embedding twice, as ``shared`` and as ``encoder.embed_tokens``. `neighbours` names for each head
    the one word it looks at by its distance, from -7 to 7: without training the encoding of a word then tells which words
    stand beside it. The gains say how much attention and MLP add to a word.
    """
    rng = np.random.default_rng(seed)
    wide = d_ff or 2 * d_model
    inner = heads * d_kv
    num_tokens = vocab_size or t5_vocab_size()
    embedding = normal(rng, num_tokens, d_model, std=1.0)
    w: Weights = {"shared.weight": embedding, "encoder.embed_tokens.weight": embedding}
    for index in range(layers):
        attention = f"encoder.block.{index}.layer.0"
        # T5 does not divide attention scores by the head size; its query weights are smaller instead.
        w[f"{attention}.SelfAttention.q.weight"] = normal(rng, inner, d_model, std=(d_model * d_kv) ** -0.5)
        w[f"{attention}.SelfAttention.k.weight"] = normal(rng, inner, d_model, std=d_model**-0.5)
        w[f"{attention}.SelfAttention.v.weight"] = normal(rng, inner, d_model, std=d_model**-0.5)
        w[f"{attention}.SelfAttention.o.weight"] = normal(rng, d_model, inner, std=attention_gain * inner**-0.5)
        if index == 0:
            bias = normal(rng, 32, heads, std=0.5)
            for head, distance in enumerate(neighbours or ()):
                # Near distances have buckets of their own: 0 to 7 those before, 16 and more those after.
                bias[distance + 16 if distance > 0 else -distance, head] = _SURE
            w[f"{attention}.SelfAttention.relative_attention_bias.weight"] = bias
        w[f"{attention}.layer_norm.weight"] = ones(d_model)
        feed_forward = f"encoder.block.{index}.layer.1"
        w[f"{feed_forward}.DenseReluDense.wi_0.weight"] = normal(rng, wide, d_model, std=d_model**-0.5)
        w[f"{feed_forward}.DenseReluDense.wi_1.weight"] = normal(rng, wide, d_model, std=d_model**-0.5)
        w[f"{feed_forward}.DenseReluDense.wo.weight"] = normal(rng, d_model, wide, std=mlp_gain * wide**-0.5)
        w[f"{feed_forward}.layer_norm.weight"] = ones(d_model)
    w["encoder.final_layer_norm.weight"] = ones(d_model)
    config = {
        "d_model": d_model,
        "d_ff": wide,
        "d_kv": d_kv,
        "num_heads": heads,
        "num_layers": layers,
        "vocab_size": num_tokens,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
    write_safetensors(path, w, dtype=dtype, config=config)
    return path
