"""Modulation layers whose frozen weights are not on the device: each is brought for the moment of its product.

A modulation's product is one vector a sample, so that its weight, a quarter of FLUX.1 all together, is read once a
forward pass and needed for backward only where something before it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.flux import Flux
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.layers import Modulation

Bring: TypeAlias = Callable[[Tensor], Tensor]
"""A tensor in main memory -> the same on the device, for use at once."""


class HostLinear(FrozenLinear):
    """A `FrozenLinear` whose weight stays in main memory, or in the model's file, mapped. The bias is on the device."""

    stays_on_host = True
    """Block swap leaves such weights alone."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, bring: Bring) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=bias)
        self._bring = bring
        self._hand_back: Callable[[], None] | None = None

    @property
    def is_mapped(self) -> bool:
        return self._hand_back is not None

    def set_mapped(self, weight: Tensor, hand_back: Callable[[], None]) -> None:
        """Takes a weight that is a mapped file; `hand_back` gives its pages back to the system after each use."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._hand_back = hand_back

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        weight = self._bring(self.weight)
        if self._hand_back is not None:
            self._hand_back()
        return weight.to(dtype)

    def product(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = cast("Tensor | None", self.bias)
        return F.linear(input.to(dtype), self.dense_weight(dtype), None if bias is None else bias.to(dtype))


def keep_modulation_on_host(model: Flux, bring: Bring) -> dict[str, HostLinear]:
    """Puts a `HostLinear` without memory in the place of every block's modulation layers. Gives them by path."""
    model.modulates_outside = True
    found: dict[str, HostLinear] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, Modulation):
            lin = module.lin
            has_bias = cast("Tensor | None", lin.bias) is not None
            module.lin = HostLinear(lin.in_features, lin.out_features, bias=has_bias, bring=bring)
            found[f"{path}.lin"] = module.lin
    return found


def count_mapped(model: nn.Module) -> tuple[int, int]:
    """How many weights of `HostLinear` are mapped, and how many there are."""
    found = [module.is_mapped for module in model.modules() if isinstance(module, HostLinear)]
    return sum(found), len(found)
