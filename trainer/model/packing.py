"""Between latents and the token sequence the transformer sees.

B batch, C latent channels, h w latent size, N = (h/2)(w/2) image tokens, L text tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 2


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, 4C). Tokens run row by row; a token's features are ordered channel, row, column."""
    batch, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latent size {height} x {width} is not a multiple of {PATCH}")
    rows, columns = height // PATCH, width // PATCH
    patches = latents.reshape(batch, channels, rows, PATCH, columns, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * PATCH * PATCH)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, N, 4C) -> (B, C, h, w) for latents of `height` x `width`; the inverse of `pack_latents`."""
    batch, num_tokens, features = tokens.shape
    rows, columns = height // PATCH, width // PATCH
    if height % PATCH or width % PATCH or num_tokens != rows * columns:
        raise ValueError(f"{num_tokens} tokens do not make latents of {height} x {width}")
    channels = features // (PATCH * PATCH)
    patches = tokens.reshape(batch, rows, columns, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """Position ids (1, rows * columns, 3), fp32: (0, row, column) for a grid of tokens; the same for a whole batch."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.reshape(1, rows * columns, 3)


def text_ids(num_tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Position ids (1, L, 3) of text: all zero."""
    return torch.zeros(1, num_tokens, 3, device=device)
