"""A training picture: which pixels of which file, and how they become the autoencoder's input."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.data.augment import change_colour
from trainer.data.decoding import DECODE_ERRORS, decode_failure, load_image
from trainer.data.pictures import Picture
from trainer.data.resizing import resize
from trainer.schema.base import UserError


def read_pixels(picture: Picture) -> Tensor:
    """(3, height, width) float32 in [-1, 1] of the picture's bucket. Raises `UserError` when it cannot be decoded."""
    try:
        image = load_image(picture.path, is_masked_by_alpha=picture.is_masked_by_alpha)
    except DECODE_ERRORS as error:
        raise UserError(
            f"{picture.path}: cannot be decoded ({decode_failure(error)})",
            hint="The file changed or vanished after the start of the run; replace it and start again.",
        ) from error
    pixels = resize(image, picture.resized, picture.resize_interpolation)
    left, top = picture.crop
    width, height = picture.bucket
    cut = pixels[top : top + height, left : left + width]
    if cut.shape[:2] != (height, width):
        raise ValueError(f"{picture.path}: {picture.bucket} does not fit into {picture.resized} at {picture.crop}")
    if picture.colour is not None:
        cut = change_colour(cut, picture.colour)
    if picture.is_flipped:
        cut = cut[:, ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1).contiguous()
    return (tensor.float() / 255.0 - 0.5) / 0.5
