"""A Linear whose weight may be somewhere else between forward and backward."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


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
            return self.product(input)
        return cast("Tensor", _FrozenLinearFunction.apply(input, self))

    def product(self, input: Tensor) -> Tensor:
        """What `forward` gives, as torch's autograd sees it."""
        return F.linear(input, self.weight, self.bias)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) in `dtype`, for use at once."""
        return self.weight.to(dtype)


class _FrozenLinearContext(FunctionCtx):
    module: FrozenLinear
    input_dtype: torch.dtype


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FrozenLinearContext, input: Tensor, module: FrozenLinear) -> Tensor:
        ctx.module = module
        ctx.input_dtype = input.dtype
        return module.product(input)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _FrozenLinearContext, grad_output: Tensor
    ) -> tuple[Tensor, None]:
        # Backward may be called inside an autocast region; the products below are already in the right type.
        with torch.autocast(grad_output.device.type, enabled=False):
            weight = ctx.module.dense_weight(grad_output.dtype)
            grad_input = torch.mm(grad_output.reshape(-1, weight.shape[0]), weight)
            grad_input = grad_input.view(*grad_output.shape[:-1], weight.shape[1])
            return grad_input.to(ctx.input_dtype), None
