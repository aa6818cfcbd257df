"""GGPO: noise on the weights of LoRA layers during training, stronger where norms and gradients are large.

Formulas of kohya-ss/sd-scripts (`ggpo_sigma`, `ggpo_beta`). O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.lora.adapter import compute_dtype, frozen_weight

_MAX_ROWS: Final = 1000


class Perturbation:
    """Fresh noise for each forward pass, with deviation (sigma * ||row|| + beta * g^2) / sqrt(O) in each row.

    ||row|| is the norm of the mean base row and the LoRA's row together, g that of the row's gradient. Both are taken
    before each optimizer step; before the first one there is no noise. No gradient passes through it.
    """

    def __init__(self, base: nn.Linear, sigma: float, beta: float) -> None:
        self._sigma, self._beta = sigma, beta
        self._num_out, self._num_in = base.out_features, base.in_features
        # Evenly spread instead of drawn rows: the same estimate in every run.
        step = -(-self._num_out // _MAX_ROWS)
        self._base_norm = (
            0.0 if base.weight.is_meta else float(frozen_weight(base, torch.float32)[::step].norm(dim=1).mean())
        )
        self.deviation: Tensor | None = None

    def update(
        self, down: Tensor, up: Tensor, parts: Sequence[slice], gradients: tuple[Tensor, Tensor], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Takes the norms of the LoRA and of its weight's gradient, from the `gradients` of down and up.

        Gives the mean norm of the LoRA's rows, and that of these and the base's together.
        """
        rank = up.shape[1]
        norms = torch.empty(self._num_out, device=up.device)
        for index, part in enumerate(parts):
            norms[part] = row_norms(up[part], down[index * rank : (index + 1) * rank])
        combined = (norms.square() + self._base_norm**2).sqrt()
        slopes = scale * row_slopes(down, up, parts, gradients)
        self.deviation = (self._sigma * combined + self._beta * slopes.square()) / self._num_out**0.5
        return norms.mean(), combined.mean()

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the noise adds to the output for `x` (..., I), in `dtype`."""
        if self.deviation is None:
            return torch.zeros((), dtype=dtype, device=x.device)
        with torch.no_grad():
            noise = torch.randn(self._num_out, self._num_in, device=x.device, dtype=compute_dtype(x))
            noise *= self.deviation.to(noise.dtype)[:, None]
            return F.linear(x.detach().to(noise.dtype), noise).to(dtype)


def row_slopes(down: Tensor, up: Tensor, parts: Sequence[slice], gradients: tuple[Tensor, Tensor]) -> Tensor:
    """Norms of the rows of up @ (gradient of down) + (gradient of up) @ down, (O,): how fast up @ down changes."""
    rank, (grad_down, grad_up) = up.shape[1], gradients
    slopes = torch.empty(up.shape[0], device=up.device)
    for index, part in enumerate(parts):
        block = slice(index * rank, (index + 1) * rank)
        slopes[part] = row_norms(
            torch.cat((up[part], grad_up[part]), dim=1), torch.cat((grad_down[block], down[block]))
        )
    return slopes


def row_norms(up: Tensor, down: Tensor) -> Tensor:
    """Norms of the rows of up @ down, (O,), without making the product."""
    up, down = up.float(), down.float()
    return ((up @ (down @ down.t())) * up).sum(dim=1).clamp_min(0).sqrt()
