"""fp16's range, for what adapters compute: nothing here changes anything in the other types.

An adapter reads the input of the Linear that it stands in place of, and FLUX has outliers there. down(x) may leave fp16's
range where the Linear's own output stays inside, and infinity times an up of zeros, or minus infinity, is no number.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FP16_LARGEST: Final = 65504.0
_FP16_INNER_SCALE: Final = 1.0 / 64.0
"""A power of two, so that nothing but the range changes: down(x) may reach 64 times fp16's largest number."""


def inner_scale(dtype: torch.dtype) -> float:
    """What `down` is scaled with when it is multiplied in `dtype`, and what is multiplied with up is divided by."""
    return _FP16_INNER_SCALE if dtype is torch.float16 else 1.0


def scaled_down(down: Tensor, dtype: torch.dtype) -> Tensor:
    """`down` (R, I) in `dtype`, scaled with `inner_scale`."""
    return (down * _FP16_INNER_SCALE).to(dtype) if dtype is torch.float16 else down.to(dtype)


def held(x: Tensor) -> Tensor:
    """`x`, its fp16 infinities replaced by the largest number; there the gradient is 0."""
    return x.clamp(-FP16_LARGEST, FP16_LARGEST) if x.dtype is torch.float16 else x


def to_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, without infinities where that is fp16."""
    return x.clamp(-FP16_LARGEST, FP16_LARGEST).to(dtype) if dtype is torch.float16 else x.to(dtype)
