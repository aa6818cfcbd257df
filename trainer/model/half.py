"""fp16's range.

FLUX.1 has activations beyond fp16's largest number: outlier channels of the streams, and of what the blocks add to them.
In fp16, and only there, the streams are kept in fp32, what is added to them is computed scaled down, and every other
Linear's output is held inside the range. In the other types these functions give back what they get.

B batch, L tokens, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
