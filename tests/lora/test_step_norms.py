"""The norms that are logged of each step, against the whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.lora.test_fp16_range import NAME, adapted
from trainer.lora.lora import LoraLinear
from trainer.lora.network import LoraNetwork
from trainer.lora.split import merge_up


def mean_row_norm(matrix: Tensor) -> float:
    return float(matrix.norm(dim=1).mean())


@pytest.mark.parametrize("kind", ["lora", "split qkv", "ggpo"])
def test_they_are_means_over_rows_and_layers(kind: str) -> None:
    adapters: dict[str, LoraLinear] = {}
    slopes, norms, combined = list[float](), list[float](), list[float]()
    for name, size in ((NAME, 0.1), (NAME.replace("0", "1"), 0.2)):
        adapter = adapted(kind, size)
        assert isinstance(adapter, LoraLinear)
        adapters[name] = adapter
        draw = torch.Generator().manual_seed(len(adapters))
        adapter.lora_down.grad = torch.randn(adapter.lora_down.shape, generator=draw)
        adapter.lora_up.grad = torch.randn(adapter.lora_up.shape, generator=draw)
        down, up = adapter.lora_down.detach(), merge_up(adapter.lora_up.detach(), adapter.parts)
        grad_down, grad_up = adapter.lora_down.grad, merge_up(adapter.lora_up.grad, adapter.parts)
        slopes.append(mean_row_norm(adapter.scale * (up @ grad_down + grad_up @ down)))
        norms.append(mean_row_norm(up @ down))
        base = adapter.base.weight.norm(dim=1).mean()
        combined.append(float(((up @ down).square().sum(dim=1) + base**2).sqrt().mean()))
    network = LoraNetwork(adapters)
    expected = {"norm/avg_grad_norm": sum(slopes) / 2}
    if kind == "ggpo":
        expected |= {"norm/avg_key_norm": sum(norms) / 2, "norm/avg_combined_norm": sum(combined) / 2}
    assert network.before_step() == {}
    assert network.before_step(measures=True) == pytest.approx(expected, rel=1e-4)
