"""DoRA: a LoRA that trains direction and magnitude apart, after Liu et al., "DoRA: Weight-Decomposed Low-Rank
Adaptation" (2024), arXiv 2402.09353.

W' = m * V / ||V|| with V = W + scale * up down: the norms of V's columns or rows are replaced by trained ones. As in
section 4.3 of the paper the norm is taken for constant in backward. Two readings of it are in use, and a file of one
cannot be expressed in the other:

    in    a magnitude for each in feature, the norm of a column, as the paper's equation 5 has it. V x with columns
          scaled by c is V (c * x), a LoRA on a scaled input. Saved as `dora_scale` (1, I) beside published names, which
          ComfyUI applies as it was trained (`weight_decompose` in its `comfy/weight_adapter/base.py`)
    out   a magnitude for each out feature, the norm of a row, as the paper's authors and PEFT compute it. Saved for
          diffusers as `lora_magnitude_vector.weight` (O). ComfyUI would divide it by the norms of W instead of V.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.lora.adapter import Trained, frozen_weight, weight_dtype, wrong_part
from trainer.lora.half import held, inner_scale, scaled_down, to_type
from trainer.lora.lora import LoraLinear
from trainer.schema.network_args import DoraAxis

_TINY = 1e-12


class DoraLinear(LoraLinear):
    """A `LoraLinear` with `magnitude` (I) or (O), which trains too and begins as the norms of the base."""

    def __init__(self, base: nn.Linear, *arguments: Any, axis: DoraAxis = "in", **options: Any) -> None:
        super().__init__(base, *arguments, **options)
        self.axis: DoraAxis = axis
        squares = frozen_weight(base, torch.float32).square().sum(dim=0 if axis == "in" else 1)
        self.base_squares = nn.Parameter(squares, requires_grad=False)
        # At the beginning V is W, whatever the LoRA begins with.
        self.magnitude = nn.Parameter(squares.clamp_min(_TINY).sqrt())

    def trained(self) -> tuple[Trained, ...]:
        return (*super().trained(), Trained("magnitude", "magnitude", self.magnitude))

    def norms(self) -> Tensor:
        """||V|| of each column (I) or row (O), at multiplier 1. Nothing of the size of the weight is kept or made."""
        scale = self.alpha / self.rank
        with torch.no_grad(), torch.autocast(self.lora_up.device.type, enabled=False):
            down, up = (factor.float() for factor in self.factors())
            squares = self.base_squares.clone()
            rank, dtype = up.shape[1], weight_dtype(self.base)
            weight = frozen_weight(self.base, dtype)
            for index, part in enumerate(self.parts):
                rows, block = up[part], down[index * rank : (index + 1) * rank]
                own = weight[part].to(up.device)
                if self.axis == "in":
                    crossed = (scaled_down(rows.t(), dtype) @ own).float() / inner_scale(dtype)
                    squares += 2 * scale * (block * crossed).sum(dim=0)
                    squares += scale**2 * (block * ((rows.t() @ rows) @ block)).sum(dim=0)
                else:
                    crossed = (own @ scaled_down(block.t(), dtype)).float() / inner_scale(dtype)
                    squares[part] += 2 * scale * (rows * crossed).sum(dim=1)
                    squares[part] += scale**2 * (rows * (rows @ (block @ block.t()))).sum(dim=1)
            return squares.clamp_min(_TINY).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.multiplier == 0 or (self.training and self._drops_module()):
            return self.base(x)
        factor = self.magnitude / self.norms()
        if self.axis == "in":
            output = self._adapted(to_type(x * factor, x.dtype), self.alpha / self.rank)
        else:
            output = held(self._adapted(x, self.alpha / self.rank))
            # The bias is no part of V.
            offset = 0.0 if self.bias is None else self.bias.float() * (1 - factor)
            output = to_type(output * factor + offset, output.dtype)
        if self.multiplier == 1:
            return output
        base = held(self.base(x))
        return base + self.multiplier * (held(output) - base)

    def published(self) -> dict[str, Tensor]:
        return {**super().published(), "dora_scale": self.magnitude.detach().view(self._file_shape)}

    def load(self, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
        """Also takes a LoRA without a magnitude: then with the one that leaves its effect as it is."""
        super().load(tensors, name, where)
        given = tensors.get("dora_scale")
        if given is not None and tuple(given.shape) != self._file_shape:
            shape = list(self._file_shape)
            other = "out" if self.axis == "in" else "in"
            raise wrong_part(
                f"{name} has a dora_scale of shape {list(given.shape)}; with dora_axis={self.axis} it is {shape}",
                where,
                f'Add "dora_axis={other}" to the network settings.'
                if tuple(given.shape) in ((1, self.base.in_features), (self.base.out_features, 1))
                else "Merge this file into the model instead.",
            )
        self.magnitude.data.copy_(self.norms() if given is None else given.flatten())

    @property
    def _file_shape(self) -> tuple[int, int]:
        return (1, self.base.in_features) if self.axis == "in" else (self.base.out_features, 1)
