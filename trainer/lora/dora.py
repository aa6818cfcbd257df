"""DoRA: a LoRA that trains direction and magnitude apart, after Liu et al., "DoRA: Weight-Decomposed Low-Rank
Adaptation" (2024), arXiv 2402.09353.

W' = m * V / ||V|| with V = W + scale * up down: the norm of each column of V, one for each in feature, is replaced by a
trained one. As in section 4.3 of the paper the norm is taken for constant in backward. Since V x with columns scaled by
c is V (c * x), it is a LoRA on a scaled input. The magnitude is saved as `dora_scale` (1, I), which other programs read.

(Some scale rows instead. The common loaders then divide by the norms of W, not of V, so that such files are not applied
as they were trained.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.lora.adapter import Trained, wrong_part
from trainer.lora.half import held, inner_scale, scaled_down, to_type
from trainer.lora.lora import LoraLinear

_TINY = 1e-12


class DoraLinear(LoraLinear):
    """A `LoraLinear` with `magnitude` (I), which trains too and begins as the norms of the base's columns."""

    def __init__(self, base: nn.Linear, *arguments: Any, **options: Any) -> None:
        super().__init__(base, *arguments, **options)
        squares = base.weight.detach().float().square().sum(dim=0)
        self.base_squares = nn.Parameter(squares, requires_grad=False)
        self.magnitude = nn.Parameter(self.column_norms())

    def trained(self) -> tuple[Trained, ...]:
        return (*super().trained(), Trained("magnitude", "magnitude", self.magnitude))

    def column_norms(self) -> Tensor:
        """||V|| of each column (I), at multiplier 1. Nothing of the size of the weight is kept or made."""
        scale = self.alpha / self.rank
        with torch.no_grad(), torch.autocast(self.base.weight.device.type, enabled=False):
            down, up = self.factors()
            squares = self.base_squares.clone()
            weight, rank = self.base.weight, up.shape[1]
            dtype = weight.dtype if weight.dtype.itemsize > 1 else up.dtype
            for index, part in enumerate(self.parts):
                rows, block = up[part], down[index * rank : (index + 1) * rank]
                crossed = (scaled_down(rows.t(), dtype) @ weight[part].to(up.device, dtype)).float() / inner_scale(
                    dtype
                )
                squares += 2 * scale * (block * crossed).sum(dim=0)
                squares += scale**2 * (block * ((rows.t() @ rows) @ block)).sum(dim=0)
            return squares.clamp_min(_TINY).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.multiplier == 0 or (self.training and self._drops_module()):
            return self.base(x)
        scaled = to_type(x * (self.magnitude / self.column_norms()), x.dtype)
        output = self._adapted(scaled, self.alpha / self.rank)
        if self.multiplier == 1:
            return output
        base = held(self.base(x))
        return base + self.multiplier * (held(output) - base)

    def published(self) -> dict[str, Tensor]:
        return {**super().published(), "dora_scale": self.magnitude.detach()[None]}

    def load(self, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
        """Also takes a LoRA without a magnitude: then with the one that leaves its effect as it is."""
        super().load(tensors, name, where)
        given = tensors.get("dora_scale")
        if given is not None and tuple(given.shape) != (1, self.base.in_features):
            raise wrong_part(
                f"{name} has a dora_scale of shape {list(given.shape)}; here it is one for each in feature, "
                f"{[1, self.base.in_features]}",
                where,
                "Merge this file into the model instead.",
            )
        self.magnitude.data.copy_(self.column_norms() if given is None else given[0])
