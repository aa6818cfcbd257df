"""What every kind of adapter has in common: it stands in a Linear's place, trains a little, and is written to a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.schema.base import UserError

Role = Literal["down", "up", "magnitude", "blocks"]


@dataclass(frozen=True)
class Trained:
    """One trained tensor of an adapter: its name in the adapter and what it is, which decides its learning rate."""

    name: str
    role: Role
    parameter: nn.Parameter


class Adapter(nn.Module, ABC):
    """Stands in the place of the frozen Linear that it holds as `base`. `multiplier` is its strength; 0 gives the base."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.multiplier = 1.0

    @property
    def weight(self) -> Tensor:
        """The base's weight as it is stored: T5 looks at the type of its Linears' weights."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    @abstractmethod
    def alpha(self) -> float:
        """What the adapter's strength is divided from (LoRA) or how far it may go (OFT); a whole number stays an int."""

    @abstractmethod
    def trained(self) -> tuple[Trained, ...]:
        """Everything that trains, in the order in which optimizers see it."""

    @abstractmethod
    def published(self) -> dict[str, Tensor]:
        """Part -> tensor, as a file has them."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
        """Takes the parts of a file. Raises `UserError` when they don't fit."""


def wrong_part(what: str, where: str, hint: str | None = None) -> UserError:
    """The error for a file that does not fit, at the option that named it."""
    return UserError(what, where, hint, field="network_weights")


# ------------------------------------------------------------------------------------------------------ base weight


@runtime_checkable
class MadeDense(Protocol):
    """A Linear whose `weight` may be stored in another form than the product needs."""

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`."""
        ...


def frozen_weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The base's weight for a product in `dtype`. Read it when it is needed and don't keep it: it may be swapped out."""
    return base.dense_weight(dtype) if isinstance(base, MadeDense) else base.weight.to(dtype)


def weight_dtype(base: nn.Linear) -> torch.dtype:
    """The type of the base's weight, or where that is stored in fewer bits, the one that the base computes in."""
    if base.weight.dtype.itemsize > 1:
        return base.weight.dtype
    bias = cast("Tensor | None", base.bias)
    return torch.float32 if bias is None else bias.dtype


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a Linear computes with input `x`: autocast's inside its region, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def base_linear(base: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """The base's product as `nn.Linear` computes it; a weight that is stored in 8 bit, or elsewhere, is made for the moment."""
    if base.weight.dtype.itemsize > 1 and not getattr(base, "stays_on_host", False):
        return F.linear(x, base.weight, bias)
    dtype = compute_dtype(x)
    return F.linear(x.to(dtype), frozen_weight(base, dtype), None if bias is None else bias.to(dtype))


class _FrozenContext(FunctionCtx):
    base: nn.Linear
    input_dtype: torch.dtype


class _FrozenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FrozenContext, x: Tensor, base: nn.Linear) -> Tensor:
        ctx.base, ctx.input_dtype = base, x.dtype
        return base_linear(base, x, None)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _FrozenContext, grad_output: Tensor
    ) -> tuple[Tensor, None]:
        with torch.autocast(grad_output.device.type, enabled=False):
            grad = grad_output.reshape(-1, grad_output.shape[-1]) @ frozen_weight(ctx.base, grad_output.dtype)
            return grad.view(*grad_output.shape[:-1], -1).to(ctx.input_dtype), None


def product_without_bias(base: nn.Linear, x: Tensor) -> Tensor:
    """W x, (..., I) -> (..., O), with the gradient for x; the weight is read again for backward and never kept."""
    return cast("Tensor", _FrozenFunction.apply(x, base))
