"""The parts of the FLUX.1 transformer. Module and parameter names are those of the published checkpoints.

B batch, L tokens, H heads, D head dim, C channels (C = H * D), M hidden size of the MLP.

Nearly all time goes into the matrix products and the attention; the rest is memory traffic. What surrounds them is
written to read and write each big tensor few times: modulation is the affine part of the layer norm, and query-key norm,
rotation and the split into query, key and value are one autograd function that keeps only its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

NORM_EPS = 1e-6


# --------------------------------------------------------------------------------------------------- frozen linear


class FrozenLinear(nn.Linear):
    """A Linear whose frozen weight is not kept by autograd: backward reads `weight` from the module again.

    So the weight's storage may be somewhere else between forward and backward, as long as it is in place when either
    runs. Values are those of `nn.Linear`, also under autocast. A weight or bias that requires a gradient takes the
    ordinary path.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        trains = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        if trains or not (input.requires_grad and torch.is_grad_enabled()):
            return F.linear(input, self.weight, self.bias)
        return cast("Tensor", _FrozenLinearFunction.apply(input, self))


class _FrozenLinearContext(FunctionCtx):
    module: FrozenLinear
    input_dtype: torch.dtype


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FrozenLinearContext, input: Tensor, module: FrozenLinear) -> Tensor:
        ctx.module = module
        ctx.input_dtype = input.dtype
        return F.linear(input, module.weight, module.bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _FrozenLinearContext, grad_output: Tensor
    ) -> tuple[Tensor, None]:
        # Backward may be called inside an autocast region; the products below are already in the right type.
        with torch.autocast(grad_output.device.type, enabled=False):
            weight = ctx.module.weight.to(grad_output.dtype)
            grad_input = torch.mm(grad_output.reshape(-1, weight.shape[0]), weight)
            grad_input = grad_input.view(*grad_output.shape[:-1], weight.shape[1])
            return grad_input.to(ctx.input_dtype), None


# ------------------------------------------------------------------------------------------------------ fp16's range

# FLUX.1 has activations beyond fp16's largest number: outlier channels of the streams, and of what the blocks add to
# them. In fp16, and only there, the streams are kept in fp32, what is added to them is computed scaled down, and
# every other Linear's output is held inside the range. In the other types these functions give back what they get.

FP16_LARGEST = 65504.0
FP16_OUTPUT_SCALE = 1.0 / 16.0
"""A power of two, so that nothing but the range changes: outputs may reach 16 times fp16's largest number."""


def saturated(x: Tensor) -> Tensor:
    """`x`, its fp16 infinities replaced by fp16's largest number; there the gradient is 0."""
    return x.clamp(-FP16_LARGEST, FP16_LARGEST) if x.dtype is torch.float16 else x


def as_stream(x: Tensor) -> Tensor:
    """`x` as the start of a residual stream: fp32 in place of fp16."""
    return saturated(x).float() if x.dtype is torch.float16 else x


def to_compute(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, without infinities where that is fp16."""
    return x.clamp(-FP16_LARGEST, FP16_LARGEST).to(dtype) if dtype is torch.float16 else x.to(dtype)


def stream_update(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`, (..., I) -> (..., O), for adding to a stream: in fp16 an fp32 tensor that may leave fp16's range.

    `linear` is a Linear, or one with an adapter: whatever is linear in x but for an offset. That must not be scaled, so
    it is asked for with an x of zeros.
    """
    if x.dtype is not torch.float16:
        return linear(x)
    with torch.no_grad():
        offset = linear(x.new_zeros(1, x.shape[-1])).float()
    return (saturated(linear(x * FP16_OUTPUT_SCALE)).float() - offset) / FP16_OUTPUT_SCALE + offset


# ------------------------------------------------------------------------------------------------------- embeddings


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding (B, dim) in fp32 of `t` (B) in [0, 1], cosines first. `dim` is even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = (1000.0 * t.float())[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotation_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """The rotation of every token as unit complex numbers: ids (B, L, axes) -> complex64 (B, L, D/2).

    Angles are formed in fp64: positions times frequencies lose up to five digits of their fractional part in fp32.
    """
    # MPS has no fp64; the table is small and made once a step.
    position = (ids.cpu() if ids.device.type == "mps" else ids).double()
    angles: list[Tensor] = []
    for axis, dim in enumerate(axes_dim):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim
        angles.append(position[..., axis, None] * theta**-exponent)
    angle = torch.cat(angles, dim=-1)
    return torch.complex(angle.cos().float(), angle.sin().float()).to(ids.device)


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


# -------------------------------------------------------------------------------------------------------- attention


class RMSNorm(nn.Module):
    """Holds the scale of a query or key norm; `split_norm_rotate` applies it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the type of x."""
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), NORM_EPS)


class QKNorm(nn.Module):
    """The two norms of an attention layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class SelfAttention(nn.Module):
    """The Linears and norms one stream of a double block brings to the joint attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = FrozenLinear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = FrozenLinear(dim, dim)


def split_norm_rotate(
    streams: tuple[Tensor, ...], norms: tuple[QKNorm, ...], num_heads: int, pe: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value of the joint sequence, normalised and rotated, and what follows them in the projections.

    `streams` holds one projection (B, L_i, 3C + R) for each part of the sequence, in its order, and `norms` its norms;
    `pe` (1 or B, sum of L_i, D/2) is the rotation table. R is 0 unless there is one stream. Gives query, key and value
    (B, L, H, D) in the type of the projections, and the rest (B, L, R).
    """
    scales = [scale for norm in norms for scale in (norm.query_norm.scale, norm.key_norm.scale)]
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", _SplitNormRotate.apply(num_heads, pe, *streams, *scales))


class _SplitNormRotateContext(FunctionCtx):
    num_streams: int
    num_heads: int
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def _head_view(projection: Tensor, part: int, num_heads: int, head_dim: int) -> Tensor:
    """One of query, key, value inside a projection (B, L, 3C + R), as (B, L, H, D) without a copy."""
    dim = num_heads * head_dim
    return projection[..., part * dim : (part + 1) * dim].unflatten(-1, (num_heads, head_dim))


def _as_complex(x: Tensor) -> Tensor:
    """(..., D) -> complex (..., D/2) on the same memory: neighbouring features are one number."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class _SplitNormRotate(torch.autograd.Function):
    """Saves the projections, which the MLP half of a single block keeps alive anyway, and one number a head.

    Arithmetic is fp32 (fp64 for fp64 inputs) in one work buffer, whatever type goes in and out.
    """

    @staticmethod
    def forward(
        ctx: _SplitNormRotateContext, num_heads: int, pe: Tensor, *streams_and_scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_streams = len(streams_and_scales) // 3
        streams, scales = streams_and_scales[:num_streams], streams_and_scales[num_streams:]
        head_dim = scales[0].shape[0]
        first = streams[0]
        work_dtype = torch.promote_types(first.dtype, torch.float32)
        batch, length = first.shape[0], sum(stream.shape[1] for stream in streams)
        shape = (batch, length, num_heads, head_dim)
        query, key = first.new_empty(shape), first.new_empty(shape)
        joint = num_streams > 1
        value = first.new_empty(shape) if joint else _head_view(first, 2, num_heads, head_dim)
        inverse_rms: list[Tensor] = []
        start = 0
        for index, stream in enumerate(streams):
            end = start + stream.shape[1]
            rotation = pe[:, start:end, None, :]
            for part, output in enumerate((query, key)):
                x = _head_view(stream, part, num_heads, head_dim)
                factor = _inverse_rms(x, work_dtype)
                inverse_rms.append(factor)
                target = output[:, start:end]
                work = target if target.dtype == work_dtype else torch.empty_like(target, dtype=work_dtype)
                torch.mul(x, factor, out=work)
                work.mul_(scales[2 * index + part])
                _as_complex(work).mul_(rotation)
                if work is not target:
                    target.copy_(work)
            if joint:
                value[:, start:end] = _head_view(stream, 2, num_heads, head_dim)
            start = end
        ctx.num_streams, ctx.num_heads = num_streams, num_heads
        ctx.save_for_backward(pe, *streams_and_scales, *inverse_rms)
        return query, key, value, first[..., 3 * num_heads * head_dim :]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _SplitNormRotateContext, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_rest: Tensor
    ) -> tuple[Tensor | None, ...]:
        pe, *saved = ctx.saved_tensors
        streams = saved[: ctx.num_streams]
        scales = saved[ctx.num_streams : 3 * ctx.num_streams]
        inverse_rms = saved[3 * ctx.num_streams :]
        num_heads, head_dim = ctx.num_heads, scales[0].shape[0]
        work_dtype = torch.promote_types(streams[0].dtype, torch.float32)
        grad_streams: list[Tensor | None] = []
        grad_scales: list[Tensor | None] = []
        start = 0
        for index, stream in enumerate(streams):
            end = start + stream.shape[1]
            back_rotation = pe[:, start:end, None, :].conj()
            grad_stream = torch.empty_like(stream)
            for part, grad_output in enumerate((grad_query, grad_key)):
                which = 2 * index + part
                work = torch.empty(grad_output[:, start:end].shape, dtype=work_dtype, device=grad_output.device).copy_(
                    grad_output[:, start:end]
                )
                _as_complex(work).mul_(back_rotation)
                factor = inverse_rms[which]
                normed = _head_view(stream, part, num_heads, head_dim) * factor
                needs_scale = ctx.needs_input_grad[2 + ctx.num_streams + which]
                grad_scales.append((work * normed).sum((0, 1, 2)).to(scales[which].dtype) if needs_scale else None)
                work.mul_(scales[which])
                along = (work * normed).mean(-1, keepdim=True)
                work.addcmul_(normed, along, value=-1)
                torch.mul(work, factor, out=_head_view(grad_stream, part, num_heads, head_dim))
            _head_view(grad_stream, 2, num_heads, head_dim).copy_(grad_value[:, start:end])
            if ctx.num_streams == 1:
                grad_stream[..., 3 * num_heads * head_dim :] = grad_rest
            grad_streams.append(grad_stream)
            start = end
        return None, None, *grad_streams, *grad_scales


def _inverse_rms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, H, D) -> 1 / rms over D, (B, L, H, 1), in `dtype`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()


def attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Joint attention: query, key, value (B, L, H, D) -> (B, L, H * D). `key_mask` (B, 1, 1, L) is True where visible."""
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=key_mask
    )
    return output.transpose(1, 2).flatten(2)


def joint_ids(txt_ids: Tensor, img_ids: Tensor) -> Tensor:
    """(1 or B, L, 3) and (1 or B, N, 3) -> (1 or B, L + N, 3), text first."""
    batch = max(txt_ids.shape[0], img_ids.shape[0])
    return torch.cat((txt_ids.expand(batch, -1, -1), img_ids.expand(batch, -1, -1)), dim=1)


def joint_key_mask(txt_attention_mask: Tensor, num_image: int) -> Tensor:
    """(B, L) -> (B, 1, 1, L + N): the same keys are visible to every head and query; image keys always are."""
    visible = txt_attention_mask.bool()
    image = visible.new_ones(visible.shape[0], num_image)
    return torch.cat((visible, image), dim=1)[:, None, None, :]


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
