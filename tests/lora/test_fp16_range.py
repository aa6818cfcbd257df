"""Adapters in fp16 on inputs whose down(x) leaves its range: no NaN, and the numbers of fp32."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from trainer.lora.adapter import Adapter
from trainer.lora.lora import LoraLinear
from trainer.lora.targets import Target, wrap
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.half import FP16_LARGEST, saturated
from trainer.schema.lora_spec import spec_from_network_args

NAME = "lora_unet_double_blocks_0_img_attn_qkv"
KINDS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "lora": ((), {}),
    "split qkv": (("split_qkv=True",), {}),
    "dora": (("dora=True",), {}),
    "pissa": (("pissa=True",), {}),
    "ggpo": (("ggpo_sigma=0.03", "ggpo_beta=0.01"), {}),
    "neuron dropout": ((), {"network_dropout": 0.3}),
    "rank dropout": (("rank_dropout=0.3",), {}),
    "oft": (("enable_all_linear=True",), {"network_module": "networks.oft_flux", "network_alpha": 1e-3}),
}


def adapted(kind: str, base_size: float = 0.1) -> Adapter:
    """An adapter that has trained for a while, on a float32 Linear of I = 64, O = 96 with weights of that size."""
    words, more = KINDS[kind]
    spec = spec_from_network_args(words, network_dim=4, **{"network_alpha": 1.0, **more})  # pyright: ignore[reportArgumentType]
    torch.manual_seed(3)
    root = nn.Module()
    base = FrozenLinear(64, 96).requires_grad_(False)
    base.weight.data.mul_(base_size)
    root.add_module("lin", base)
    adapter = wrap(root, Target("lin", NAME, 4), spec, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for entry in adapter.trained():
            if entry.role != "magnitude" or base_size > 1:
                entry.parameter.add_(0.3 * torch.randn(entry.parameter.shape))
    if isinstance(adapter, LoraLinear) and adapter.perturbation is not None:
        adapter.perturbation.deviation = torch.full((96,), 10.0)
    return adapter


def run(adapter: Adapter, x: Tensor, dtype: torch.dtype, weight: float) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of everything that trains from the loss `weight` * sum of the outputs."""
    torch.manual_seed(8)
    with torch.autocast("cpu", torch.float16, enabled=dtype is torch.float16):
        output = saturated(adapter(x.to(dtype)))
    (output.float() * weight).sum().backward()
    return output.detach().float(), [cast("Tensor", entry.parameter.grad) for entry in adapter.trained()]


def outliers() -> Tensor:
    """Inputs far beyond those that FLUX's Linears get."""
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    x[..., :48] *= 1.5e5
    return x.clamp(-FP16_LARGEST, FP16_LARGEST).half().float().requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_at_the_end_of_the_range_give_numbers(kind: str) -> None:
    adapter = adapted(kind).train()
    half = copy.deepcopy(adapter)
    half.base.half()
    x = outliers()
    expected, _ = run(adapter, x, torch.float32, 1e-6)
    output, gradients = run(half, x, torch.float16, 1e-6)
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    inside = expected.abs() < 0.9 * FP16_LARGEST
    if kind != "ggpo":  # its noise is drawn in the type of the input
        assert inside.sum() > inside.numel() / 2
        assert (output - expected)[inside].abs().max() < 0.005 * FP16_LARGEST


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_beyond_the_range_are_its_largest_numbers(kind: str) -> None:
    adapter = adapted(kind, base_size=4.0).train()
    adapter.base.half()
    output, gradients = run(adapter, outliers(), torch.float16, 1e-6)
    assert torch.isfinite(output).all()
    assert (output.abs() == FP16_LARGEST).any()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ggpo"])
def test_at_an_ordinary_size_gradients_are_those_of_fp32(kind: str) -> None:
    adapter = adapted(kind).train()
    half = copy.deepcopy(adapter)
    half.base.half()
    x = torch.randn(2, 7, 64).half().float().requires_grad_()
    expected, exact = run(adapter, x, torch.float32, 1.0)
    output, gradients = run(half, x, torch.float16, 1.0)
    assert (output - expected).abs().max() < 0.005 * expected.abs().max()
    for gradient, other in zip(gradients, exact, strict=True):
        assert (gradient - other).abs().max() < 0.02 * other.abs().max()


def test_a_fresh_lora_whose_down_leaves_the_range_adds_nothing() -> None:
    """Its up is zero, and zero times infinity is no number."""
    root = nn.Module()
    root.add_module("lin", FrozenLinear(64, 96).requires_grad_(False).half())
    adapter = wrap(root, Target("lin", NAME, 4), spec_from_network_args(()), torch.Generator().manual_seed(0))
    x = 6e4 * torch.sign(adapter.trained()[0].parameter[0]).half()[None]
    with torch.no_grad():
        assert (x.float() @ adapter.trained()[0].parameter[0]).item() > FP16_LARGEST
        assert torch.equal(adapter(x), adapter.base(x))
