"""Max-norm regularisation (`scale_weight_norms`): a LoRA that has grown too large is scaled down.

Formula of kohya-ss/sd-scripts, after Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from
Overfitting" (2014), section 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.lora.ggpo import row_norms
from trainer.lora.lora import LoraLinear


@dataclass(frozen=True)
class NormReport:
    """How many layers were scaled, and the mean and largest norm afterwards."""

    num_scaled: int
    mean: float
    largest: float


def hold_norms(adapters: Sequence[LoraLinear], limit: float) -> NormReport:
    """Scales down and up of every layer with ||scale * up down|| above `limit` so that it is `limit`."""
    if not adapters:
        return NormReport(0, 0.0, 0.0)
    with torch.no_grad():
        norms = torch.stack([_norm(adapter) for adapter in adapters])
        ratios = limit / norms.clamp_min(limit)
        is_scaled = ratios < 1
        for adapter, ratio in zip(adapters, ratios.sqrt().unbind(), strict=True):
            adapter.lora_down.mul_(ratio)
            adapter.lora_up.mul_(ratio)
        held = norms * ratios
        # One transfer for the three numbers of hundreds of layers.
        num_scaled, mean, largest = torch.stack((is_scaled.sum().float(), held.mean(), held.max())).tolist()
    return NormReport(int(num_scaled), mean, largest)


def _norm(adapter: LoraLinear) -> torch.Tensor:
    down, up = adapter.lora_down, adapter.lora_up
    rank = up.shape[1]
    squares = [
        row_norms(up[part], down[index * rank : (index + 1) * rank]).square().sum()
        for index, part in enumerate(adapter.parts)
    ]
    return torch.stack(squares).sum().sqrt() * (adapter.alpha / adapter.rank)
