"""The joint attention of text and image: query-key norms, rotation, masks. Names are those of the published checkpoints.

B batch, L tokens, H heads, D head dim, C channels (C = H * D), R what follows query, key and value in a projection.

Query-key norm, rotation and the split into query, key and value are one autograd function that keeps only its input.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.model.frozen_linear import FrozenLinear

NORM_EPS = 1e-6


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
    (B, L, H, D) in the type of the projections, and the rest (B, L, R). A `pe` of real numbers, (1 or B, sum of L_i,
    D/2, 2) with cosine and sine, has the same done in steps that a compiler can join.
    """
    if not pe.is_complex():
        return _split_norm_rotate_in_steps(streams, norms, num_heads, pe)
    scales = [scale for norm in norms for scale in (norm.query_norm.scale, norm.key_norm.scale)]
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", _SplitNormRotate.apply(num_heads, pe, *streams, *scales))


def _split_norm_rotate_in_steps(
    streams: tuple[Tensor, ...], norms: tuple[QKNorm, ...], num_heads: int, pe: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, head_dim = streams[0].dtype, norms[0].query_norm.scale.shape[0]
    cos, sin = pe[..., None, :, :].unbind(-1)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    start = 0
    for stream, norm in zip(streams, norms, strict=True):
        end = start + stream.shape[1]
        for part, scale in enumerate((norm.query_norm.scale, norm.key_norm.scale)):
            x = _head_view(stream, part, num_heads, head_dim).to(torch.promote_types(dtype, torch.float32))
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * scale
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
            here = slice(start, end)
            turned = (first * cos[:, here] - second * sin[:, here], first * sin[:, here] + second * cos[:, here])
            parts[part].append(torch.stack(turned, dim=-1).flatten(-2).to(dtype))
        parts[2].append(_head_view(stream, 2, num_heads, head_dim))
        start = end
    query, key, value = (tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1) for tensors in parts)
    return query, key, value, streams[0][..., 3 * num_heads * head_dim :]


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
