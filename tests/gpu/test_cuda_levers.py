"""Block inputs and modulation weights that travel on streams of their own, and compiled blocks, on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.lora.network import LoraNetwork
from trainer.model.compiled import compile_blocks
from trainer.model.flux import Flux
from trainer.model.host_linear import HostLinear
from trainer.model.joint import run_again_in_backward
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import ModulationOnHost, load_flux
from trainer.offload.activations import OffloadedCheckpoint
from trainer.offload.courier import CudaCourier, make_courier
from trainer.schema.lora_spec import LoraSpec
from trainer.tools.tiny_models import make_flux

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: streams and pinned memory NOT tested"),
]

ROWS, COLUMNS, NUM_TEXT, NUM_STEPS = 16, 16, 32, 4


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Big enough that copies take longer than launching them: about 60 MB."""
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    return make_flux(path, hidden=384, heads=6, depth=4, depth_single=8, context_in_dim=64, vec_in_dim=32)


def train(
    flux_file: Path,
    *,
    offloads: bool = False,
    modulation: str | None = None,
    dropout: float = 0.0,
    change: Callable[[Flux], None] = lambda _: None,
) -> tuple[list[Tensor], Flux]:
    """The gradients after some accumulated steps."""
    device = torch.device("cuda")
    off = None if modulation is None else ModulationOnHost(make_courier(device), modulation == "file")
    assert off is None or isinstance(off.bring, CudaCourier)
    model = load_flux(flux_file, torch.bfloat16, device, modulation=off)
    model.enable_gradient_checkpointing(run=OffloadedCheckpoint(device) if offloads else run_again_in_backward)
    network = LoraNetwork.attach(
        model, None, LoraSpec(rank=4, alpha=4, dropout=dropout), torch.Generator().manual_seed(1)
    )
    network.to(device).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    change(model)
    torch.manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for _ in range(NUM_STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            output = model(
                draw(1, ROWS * COLUMNS, 64),
                image_ids(ROWS, COLUMNS, device),
                draw(1, NUM_TEXT, 64),
                text_ids(NUM_TEXT, device),
                torch.tensor([0.6], device=device),
                draw(1, 32),
                torch.tensor([1.0], device=device),
            )
        output.float().square().mean().backward()
    torch.cuda.synchronize()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None], model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_block_inputs_on_streams_give_the_gradients_of_plain_checkpointing(flux_file: Path, dropout: float) -> None:
    (plain, _), (offloaded, _) = (train(flux_file, offloads=offloads, dropout=dropout) for offloads in (False, True))
    for expected, found in zip(plain, offloaded, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("modulation", ["host", "file"])
def test_modulation_weights_on_a_stream_give_the_gradients_of_weights_on_the_device(
    flux_file: Path, modulation: str
) -> None:
    plain, _ = train(flux_file)
    brought, model = train(flux_file, modulation=modulation)
    weights = [module.weight for module in model.modules() if isinstance(module, HostLinear)]
    assert weights
    assert all(weight.device.type == "cpu" for weight in weights)
    for expected, found in zip(plain, brought, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_give_the_same_gradients_but_for_rounding(flux_file: Path) -> None:
    plain, _ = train(flux_file)
    compiled, _ = train(flux_file, offloads=True, change=lambda model: compile_blocks(model, backend="inductor"))
    largest = max(float(gradient.abs().max()) for gradient in plain)
    for expected, found in zip(plain, compiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * largest)
