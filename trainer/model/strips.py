"""The autoencoder's layers in strips of rows, so that large pictures need little beside the layers' inputs and outputs.

Unlike tiles of the picture, strips give the same result up to rounding, and no seams: the norms take their mean and
deviation from the whole tensor, and each strip of a convolution sees the rows above and below it. Nothing here has a
gradient.

B batch, C channels, H W size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.schema.memory_phases import STRIP_VALUES


def wants_strips(num_values: int) -> bool:
    """Whether a tensor of so many values is large enough, and no gradient is wanted."""
    return num_values > STRIP_VALUES and not torch.is_grad_enabled()


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, skip: Tensor | None = None, shortcut: nn.Conv2d | None = None
) -> Tensor:
    """The 3 x 3 convolution of SiLU of the normed `x` (B, C, H, W), plus `skip` of this size, through `shortcut` if given."""
    batch, _, height, width = x.shape
    scale, shift = _scale_and_shift(x, norm)
    out = torch.empty((batch, conv.out_channels, height, width), dtype=conv.weight.dtype, device=x.device)
    for first, last in _strips(height, batch * width * max(conv.in_channels, conv.out_channels)):
        top, bottom = max(first - 1, 0), min(last + 1, height)
        normed = torch.addcmul(shift, x[:, :, top:bottom].float(), scale)
        part = F.silu(normed, inplace=True).to(conv.weight.dtype)
        part = F.conv2d(_padded(part, top == first, bottom == last), conv.weight, conv.bias)
        if skip is not None:
            rows = skip[:, :, first:last]
            part = part + (rows if shortcut is None else shortcut(rows))
        out[:, :, first:last] = part
    return out


def upsampled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The 3 x 3 convolution of `x` (B, C, H, W) at twice its size: (B, C, 2H, 2W)."""
    batch, channels, height, width = x.shape
    out = torch.empty((batch, conv.out_channels, 2 * height, 2 * width), dtype=conv.weight.dtype, device=x.device)
    for first, last in _strips(height, 4 * batch * width * channels):
        top, bottom = max(first - 1, 0), min(last + 1, height)
        part = F.interpolate(x[:, :, top:bottom], scale_factor=2.0, mode="nearest")
        start = 2 * (first - top)
        end = start + 2 * (last - first)
        part = part[:, :, max(start - 1, 0) : end + 1]
        out[:, :, 2 * first : 2 * last] = F.conv2d(_padded(part, top == first, bottom == last), conv.weight, conv.bias)
    return out


def downsampled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The 3 x 3 convolution of stride 2, padded on the right and at the bottom: (B, C, H, W) to (B, C, H/2, W/2)."""
    batch, channels, height, width = x.shape
    out = torch.empty((batch, conv.out_channels, height // 2, width // 2), dtype=conv.weight.dtype, device=x.device)
    for first, last in _strips(height // 2, 2 * batch * width * channels):
        end = 2 * last + 1
        part = F.pad(x[:, :, 2 * first : end], (0, 1, 0, max(end - height, 0)))
        out[:, :, first:last] = F.conv2d(part, conv.weight, conv.bias, stride=2)
    return out


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, 1, L, C), some queries at a time where a kernel would write all scores down."""
    length = query.shape[2]
    count = max(1, 4 * STRIP_VALUES // length)
    if count >= length or not wants_strips(length * length):
        return F.scaled_dot_product_attention(query, key, value)
    parts = [F.scaled_dot_product_attention(part, key, value) for part in query.split(count, dim=2)]
    return torch.cat(parts, dim=2)


def _scale_and_shift(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """What the group norm multiplies each channel by and adds to it, (B, C, 1, 1) in float32, of the whole of `x`."""
    batch, channels, height, width = x.shape
    groups = norm.num_groups
    count = channels // groups * height * width
    strips = list(_strips(height, batch * width * channels))

    def summed(center: Tensor | None) -> Tensor:
        total = torch.zeros((batch, groups), dtype=torch.float64, device="cpu")
        for first, last in strips:
            part = x[:, :, first:last].float().reshape(batch, groups, -1)
            if center is not None:
                part = (part - center[:, :, None]).square_()
            total += part.sum(dim=2).cpu().double()
        return (total / count).to(x.device, torch.float32)

    mean = summed(None)
    deviation = torch.rsqrt(summed(mean) + norm.eps)
    weight, bias = norm.weight.float(), norm.bias.float()
    scale = deviation.repeat_interleave(channels // groups, dim=1) * weight
    shift = bias - mean.repeat_interleave(channels // groups, dim=1) * scale
    return scale[:, :, None, None], shift[:, :, None, None]


def _padded(part: Tensor, is_first: bool, is_last: bool) -> Tensor:
    """With a column of zeros on both sides, and a row where the picture ends."""
    return F.pad(part, (1, 1, int(is_first), int(is_last)))


def _strips(height: int, values_per_row: int) -> Iterator[tuple[int, int]]:
    """First and end row of each strip."""
    num_rows = max(1, STRIP_VALUES // values_per_row)
    for first in range(0, height, num_rows):
        yield first, min(first + num_rows, height)
