"""Every kind of adapter with its blocks swapped: evicted weights are filled with NaN, and the gradients are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.lora.test_network_settings import fill
from tests.offload.poison_mover import PoisonMover
from trainer.lora.network import LoraNetwork
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_flux
from trainer.offload.block_swap import BlockSwap
from trainer.schema.lora_spec import spec_from_network_args
from trainer.tools.tiny_models import make_flux


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    return make_flux(path, hidden=32, heads=2, depth=4, depth_single=8)


def gradients(flux_file: Path, settings: list[str], module: str, *, swap: bool, checkpointing: bool) -> list[Tensor]:
    model = load_flux(flux_file, torch.float32, "cpu")
    model.enable_gradient_checkpointing(checkpointing)
    spec = spec_from_network_args(settings, network_dim=2, network_module=module)
    network = LoraNetwork.attach(model, None, spec, torch.Generator().manual_seed(1))
    fill(network, 2)
    network.train()
    params, generator = model.params, torch.Generator().manual_seed(3)
    given = (
        torch.randn(1, 16, params.in_channels, generator=generator),
        image_ids(4, 4),
        torch.randn(1, 6, params.context_in_dim, generator=generator),
        text_ids(6),
        torch.tensor([0.6]),
        torch.randn(1, params.vec_in_dim, generator=generator),
        torch.tensor([1.0]),
    )

    def step() -> None:
        torch.manual_seed(4)
        model(*given).square().mean().backward()
        network.before_step()

    if swap:
        with BlockSwap(list(model.double_blocks), list(model.single_blocks), 6, PoisonMover()):
            step()
            step()
    else:
        step()
        step()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("settings", "module"),
    [
        (["split_qkv=1"], "networks.lora_flux"),
        (["dora=1", "rank_dropout=0.3"], "networks.lora_flux"),
        (["pissa=1", "rslora=1"], "networks.lora_flux"),
        (["ggpo_sigma=0.1", "ggpo_beta=1"], "networks.lora_flux"),
        (["enable_all_linear=1"], "networks.oft_flux"),
    ],
)
def test_gradients_are_those_of_no_swap(flux_file: Path, settings: list[str], module: str, checkpointing: bool) -> None:
    expected = gradients(flux_file, settings, module, swap=False, checkpointing=checkpointing)
    found = gradients(flux_file, settings, module, swap=True, checkpointing=checkpointing)
    assert len(found) >= 2 * (4 * 10 + 8 * 3) or "oft" in module
    for ours, correct in zip(found, expected, strict=True):
        assert correct.isfinite().all()
        assert torch.equal(ours, correct)
