"""The parts of the FLUX.1 transformer. Module and parameter names are those of the published checkpoints.

B batch, L tokens, C channels.

Nearly all time goes into the matrix products and the attention; the rest is memory traffic. What surrounds them is
written to read and write each big tensor few times: modulation is the affine part of the layer norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.attention import NORM_EPS, QKNorm, SelfAttention, attention, split_norm_rotate
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.half import saturated, stream_update, to_compute

# ------------------------------------------------------------------------------------------------------- embeddings


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding (B, dim) in fp32 of `t` (B) in [0, 1], cosines first. `dim` is even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = (1000.0 * t.float())[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MLPEmbedder(nn.Module):
    """Two Linears with SiLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = FrozenLinear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = FrozenLinear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, hidden_dim)."""
        return saturated(self.out_layer(self.silu(saturated(self.in_layer(x)))))


# ------------------------------------------------------------------------------------------------------- modulation


class Modulation(nn.Module):
    """The conditioning vector turned into shift, scale and gate, once for a single block, twice for a double block."""

    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.num_parts = 6 if double else 3
        self.lin = FrozenLinear(dim, self.num_parts * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """(B, C) -> shift, scale, gate, each (B, C); six of them for a double block."""
        return saturated(self.lin(F.silu(vec))).chunk(self.num_parts, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * layer_norm(x) + shift for x (B, L, C), shift and scale (B, C), in the type of x; in fp16 of an fp32 x
    when shift is fp16.

    Shift and scale are handed to the layer norm as its bias and weight, sample by sample: one pass over x, and backward
    needs nothing but x and its statistics. Autocast would only make the result fp32, which the next Linear rounds again;
    inside, the kernel works in fp32 whatever the type.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = (1 + scale).to(x.dtype).unbind(0)
        bias = shift.to(x.dtype).unbind(0)
        if len(weight) == 1:
            return _normed(F.layer_norm(x, x.shape[-1:], weight[0], bias[0], NORM_EPS), shift)
        rows = [
            F.layer_norm(row, x.shape[-1:], weight[index], bias[index], NORM_EPS)
            for index, row in enumerate(x.unbind(0))
        ]
        return _normed(torch.stack(rows), shift)


def _normed(x: Tensor, shift: Tensor) -> Tensor:
    return to_compute(x, shift.dtype) if shift.dtype is torch.float16 else x


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update for x and update (B, L, C), gate (B, C)."""
    return torch.addcmul(x, gate[:, None, :].to(update.dtype), update)


# ----------------------------------------------------------------------------------------------------------- blocks


class DoubleStreamLayers(Protocol):
    """What a double block holds beside its modulation."""

    num_heads: int
    img_attn: SelfAttention
    img_mlp: nn.Sequential
    txt_attn: SelfAttention
    txt_mlp: nn.Sequential


class SingleStreamLayers(Protocol):
    """What a single block holds beside its modulation."""

    num_heads: int
    linear1: FrozenLinear
    linear2: FrozenLinear
    norm: QKNorm


def feed_forward(dim: int, mlp_dim: int) -> nn.Sequential:
    """The MLP of one stream of a double block."""
    return nn.Sequential(FrozenLinear(dim, mlp_dim), nn.GELU(approximate="tanh"), FrozenLinear(mlp_dim, dim))


def _run_mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """(B, L, C) -> (B, L, C), to be added to a stream."""
    first, activation, second = mlp
    return stream_update(second, activation(saturated(first(x))))


def double_stream(
    block: DoubleStreamLayers,
    img: Tensor,
    txt: Tensor,
    img_modulation: Sequence[Tensor],
    txt_modulation: Sequence[Tensor],
    pe: Tensor,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A double block, wherever its modulation comes from: img (B, N, C), txt (B, L, C) -> the new img and txt.

    Each modulation is shift, scale, gate of the attention and then of the MLP, (B, C) each; pe (., L + N, D/2).
    """
    img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_modulation
    txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_modulation

    txt_qkv = saturated(block.txt_attn.qkv(modulated_norm(txt, txt_shift1, txt_scale1)))
    img_qkv = saturated(block.img_attn.qkv(modulated_norm(img, img_shift1, img_scale1)))
    query, key, value, _ = split_norm_rotate(
        (txt_qkv, img_qkv), (block.txt_attn.norm, block.img_attn.norm), block.num_heads, pe
    )
    attended = attention(query, key, value, key_mask)
    num_text = txt.shape[1]

    img = add_gated(img, img_gate1, stream_update(block.img_attn.proj, attended[:, num_text:]))
    img = add_gated(img, img_gate2, _run_mlp(block.img_mlp, modulated_norm(img, img_shift2, img_scale2)))
    txt = add_gated(txt, txt_gate1, stream_update(block.txt_attn.proj, attended[:, :num_text]))
    txt = add_gated(txt, txt_gate2, _run_mlp(block.txt_mlp, modulated_norm(txt, txt_shift2, txt_scale2)))
    return img, txt


def single_stream(
    block: SingleStreamLayers, x: Tensor, modulation: Sequence[Tensor], pe: Tensor, key_mask: Tensor | None
) -> Tensor:
    """A single block, wherever its modulation (shift, scale, gate, (B, C) each) comes from: x (B, L + N, C) -> new x."""
    shift, scale, gate = modulation
    projection = saturated(block.linear1(modulated_norm(x, shift, scale)))
    query, key, value, mlp = split_norm_rotate((projection,), (block.norm,), block.num_heads, pe)
    attended = attention(query, key, value, key_mask)
    update = stream_update(block.linear2, torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1))
    return add_gated(x, gate, update)
