"""The FLUX.1 autoencoder: images to latents and back. State-dict names are those of the published `ae.safetensors`.

Layers of large pictures are computed in strips of rows, which changes nothing but the rounding: see `strips`.

B batch, C channels, H W image size, h w latent size (H/8, W/8 for the published sizes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model import strips
from trainer.schema.checkpoint_header import AutoencoderParams

NUM_GROUPS = 32
NORM_EPS = 1e-6


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        normed = self.norm(x)
        # (B, 1, h * w, C): one head of width C.
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for layer in (self.q, self.k, self.v)
        )
        attended = strips.attention(query, key, value).squeeze(1)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class ResnetBlock(nn.Module):
    """Two convolutions, each after norm and SiLU, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        if strips.wants_strips(x.numel() // x.shape[1] * max(self.conv1.in_channels, self.conv1.out_channels)):
            hidden = strips.norm_silu_conv(x, self.norm1, self.conv1)
            return strips.norm_silu_conv(hidden, self.norm2, self.conv2, x, self.nin_shortcut)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width; the padding is on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        if strips.wants_strips(x.numel()):
            return strips.downsampled_conv(x, self.conv)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        if strips.wants_strips(4 * x.numel()):
            return strips.upsampled_conv(x, self.conv)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """One resolution: residual blocks, then a change of size except at the last level.

    Its `layers` are run by encoder and decoder themselves: who called a level would hold its input, a tensor of the
    largest size, until its last layer is done.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if index == 0 else out_channels, out_channels) for index in range(num_blocks)
        )

    def layers(self) -> Iterator[nn.Module]:
        """In the order of the computation."""
        yield from self.block


class DownLevel(_Level):
    """A level of the encoder: (B, C_in, h, w) -> (B, C_out, h/2, w/2), or the same size at the last level."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, is_last: bool) -> None:
        super().__init__(in_channels, out_channels, num_blocks)
        self.downsample = None if is_last else Downsample(out_channels)

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        if self.downsample is not None:
            yield self.downsample


class UpLevel(_Level):
    """A level of the decoder: (B, C_in, h, w) -> (B, C_out, 2h, 2w), or the same size at the last level."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, is_last: bool) -> None:
        super().__init__(in_channels, out_channels, num_blocks)
        self.upsample = None if is_last else Upsample(out_channels)

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        if self.upsample is not None:
            yield self.upsample


class Middle(nn.Module):
    """The stretch at the lowest resolution, the same in encoder and decoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to the moments of the posterior."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = [params.ch * factor for factor in params.ch_mult]
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(
                params.ch if level == 0 else widths[level - 1],
                width,
                params.num_res_blocks,
                is_last=level == len(widths) - 1,
            )
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 * z_channels, h, w)."""
        hidden = self.conv_in(x)
        for level in self.down:
            for layer in cast("_Level", level).layers():
                hidden = layer(hidden)
        return _last(self.mid(hidden), self.norm_out, self.conv_out)


class Decoder(nn.Module):
    """Unscaled latents to images. `up` is indexed by resolution, 0 the highest, and runs from the last to the first."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = [params.ch * factor for factor in params.ch_mult]
        self.conv_in = nn.Conv2d(params.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            UpLevel(
                widths[min(level + 1, len(widths) - 1)],
                width,
                params.num_res_blocks + 1,
                is_last=level == 0,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = _group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], params.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, 3, H, W)."""
        hidden = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in cast("_Level", level).layers():
                hidden = layer(hidden)
        return _last(hidden, self.norm_out, self.conv_out)


class AutoEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, 16, h, w) and back; latents carry the scale and shift of FLUX.1."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    @property
    def downscale(self) -> int:
        """Image pixels to one latent along an axis."""
        return 2 ** (len(self.params.ch_mult) - 1)

    def encode_moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 32, h, w): mean, then logarithm of the variance, of the posterior."""
        return self.encoder(images.to(self._dtype()))

    def latents_from_moments(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents (B, 16, h, w): the posterior's mean, or mean + deviation * `noise`."""
        mean, log_variance = moments.chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return self.params.scale_factor * (z - self.params.shift_factor)

    def encode(self, images: Tensor, generator: torch.Generator | None = None, sample: bool = True) -> Tensor:
        """Scaled latents (B, 16, h, w). The reference trainer samples the posterior; `sample=False` takes its mean.

        Noise is drawn on the generator's device, so a CPU generator gives the same latents on every device.
        """
        moments = self.encode_moments(images)
        if not sample:
            return self.latents_from_moments(moments, None)
        mean = moments.chunk(2, dim=1)[0]
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.latents_from_moments(moments, noise.to(mean))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1] and not clipped, from scaled latents (B, 16, h, w)."""
        z = latents.to(self._dtype()) / self.params.scale_factor + self.params.shift_factor
        return self.decoder(z)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of `images` through the mean of the posterior."""
        return self.decode(self.encode(images, sample=False))

    def _dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype


def _last(hidden: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    if strips.wants_strips(hidden.numel()):
        return strips.norm_silu_conv(hidden, norm, conv)
    return conv(F.silu(norm(hidden)))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, channels, eps=NORM_EPS)
