"""Networks that are kept in 16 bit as a whole (`full_bf16`, `full_fp16`): what trains, its gradients and its file."""

from __future__ import annotations

import pytest
import torch

from tests.lora.test_fp16_range import KINDS, NAME, adapted, run
from trainer.lora.lora import LoraLinear
from trainer.lora.network import LoraNetwork
from trainer.train.engine import HalfGradScaler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_in_it_and_computes_what_it_did(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    expected, _ = run(adapted(kind).eval(), x, torch.float32, 1e-3)
    adapter = adapted(kind).eval()
    network = LoraNetwork({NAME: adapter})
    network.train_in(dtype)
    output, gradients = run(adapter, x, torch.float32, 1e-3)
    assert (output - expected).norm() < 0.02 * expected.norm()
    assert {entry.parameter.dtype for entry in adapter.trained()} == {dtype}
    assert {gradient.dtype for gradient in gradients} == {dtype}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    trained = [entry.parameter for entry in adapter.trained()]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    optimizer.step()
    assert {optimizer.state[parameter]["exp_avg"].dtype for parameter in trained} == {dtype}


def test_a_principal_beginning_is_still_the_base() -> None:
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    adapter = adapted("pissa").eval()
    assert isinstance(adapter, LoraLinear)
    with torch.no_grad():
        adapter.lora_down.copy_(adapter.first_down)
        adapter.lora_up.copy_(adapter.first_up)
    LoraNetwork({NAME: adapter}).train_in(torch.bfloat16)
    assert torch.equal(adapter(x), adapter.base(x))


def test_the_file_keeps_the_format_and_a_whole_alpha() -> None:
    network = LoraNetwork({NAME: adapted("lora")})
    network.train_in(torch.bfloat16)
    state = network.published_state_dict(None)
    assert {key.removeprefix(f"{NAME}."): tensor.dtype for key, tensor in state.items()} == {
        "alpha": torch.float32,
        "lora_down.weight": torch.bfloat16,
        "lora_up.weight": torch.bfloat16,
    }
    assert {tensor.dtype for tensor in network.published_state_dict(torch.float32).values()} == {torch.float32}


def test_gradients_in_fp16_are_unscaled() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = HalfGradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight * 2.0**-12).sum().float()).backward()
    scaler.unscale_(optimizer)
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0**-12] * 4
