"""Masks of the loss: from files to one weight for each latent.

A mask is the picture's transparency (`alpha_mask`), or the red channel of a file of its own in `conditioning_data_dir`:
0 teaches nothing, 255 everything. It is resized, cut and mirrored exactly as its picture is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.decoding import DECODE_ERRORS, decode_failure, load_alpha, load_red
from trainer.data.pictures import Mask
from trainer.data.resizing import resize
from trainer.schema.base import UserError

LATENT_STRIDE = 8
"""Pixels of a side of one latent."""


def read_mask(mask: Mask) -> Tensor:
    """(h, w) float32 in [0, 1]. Raises `UserError` when the file cannot be decoded."""
    weights = read_weights(mask)
    height, width = weights.shape
    return to_latent_size(weights, height // LATENT_STRIDE, width // LATENT_STRIDE)


def read_weights(mask: Mask) -> Tensor:
    """(H, W) float32 in [0, 1], one for each pixel. Raises `UserError` when the file cannot be decoded."""
    try:
        image = load_alpha(mask.path) if mask.channel == "alpha" else load_red(mask.path)
    except DECODE_ERRORS as error:
        raise UserError(
            f"{mask.path}: cannot be decoded ({decode_failure(error)})",
            hint="The file changed or vanished after the start of the run; replace it and start again.",
        ) from error
    pixels = resize(image, mask.resized, mask.resize_interpolation)
    left, top = mask.crop
    width, height = mask.bucket
    cut = pixels[top : top + height, left : left + width]
    if mask.is_flipped:
        cut = cut[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(cut)).float() / 255.0


def to_latent_size(weights: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width): each latent's weight is the mean over its pixels."""
    flat = F.interpolate(weights.reshape(-1, 1, *weights.shape[-2:]), size=(height, width), mode="area")
    return flat.reshape(*weights.shape[:-2], height, width)
