"""Block swap on an NVIDIA GPU: streams and page-locked memory give the numbers of no swap, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_flux
from trainer.offload.block_swap import BlockSwap, swapped_prefixes
from trainer.offload.mover import CudaMover, make_mover
from trainer.schema.checkpoint_header import flux_params, read_header
from trainer.schema.lora_spec import LoraSpec
from trainer.tools.tiny_models import make_flux

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: streams and pinned memory NOT tested"),
]

ROWS, COLUMNS, NUM_TEXT = 16, 16, 32
NUM_STEPS = 4


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Big enough that copies take longer than launching them: about 60 MB."""
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    return make_flux(path, hidden=384, heads=6, depth=4, depth_single=8, context_in_dim=64, vec_in_dim=32)


def train(flux_file: Path, blocks_to_swap: int, *, checkpointing: bool) -> tuple[list[Tensor], int]:
    """The gradients after some accumulated steps, and the bytes that the weights took on the device."""
    device = torch.device("cuda")
    away = swapped_prefixes(flux_params(read_header(flux_file)), blocks_to_swap) if blocks_to_swap else ()
    before = torch.cuda.memory_allocated()
    model: Flux = load_flux(
        flux_file, torch.bfloat16, device, device_of=lambda name: "cpu" if away and name.startswith(away) else device
    )
    model.enable_gradient_checkpointing(checkpointing)
    network = LoraNetwork.attach(model, None, LoraSpec(rank=4, alpha=4), torch.Generator().manual_seed(1))
    network.to(device).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def step() -> None:
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

    if blocks_to_swap:
        mover = make_mover(device)
        assert isinstance(mover, CudaMover)
        with BlockSwap(list(model.double_blocks), list(model.single_blocks), blocks_to_swap, mover):
            weight_bytes = torch.cuda.memory_allocated() - before
            for _ in range(NUM_STEPS):
                step()
            torch.cuda.synchronize()
    else:
        weight_bytes = torch.cuda.memory_allocated() - before
        for _ in range(NUM_STEPS):
            step()
    return [cast("Tensor", parameter.grad).cpu() for parameter in network.parameters()], weight_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_streams_are_those_without_swap(flux_file: Path, checkpointing: bool) -> None:
    expected, all_bytes = train(flux_file, 0, checkpointing=checkpointing)
    for blocks_to_swap in (1, 2, 4):
        found, swapped_bytes = train(flux_file, blocks_to_swap, checkpointing=checkpointing)
        assert swapped_bytes < all_bytes or blocks_to_swap == 1
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_weights_wait_in_page_locked_memory(flux_file: Path) -> None:
    model = load_flux(flux_file, torch.bfloat16, "cpu")
    block = model.single_blocks[0]
    mover = make_mover(torch.device("cuda"))
    mover.take({0: [block.get_submodule("linear1").weight]}, 1)  # pyright: ignore[reportArgumentType]
    assert cast("Tensor", block.get_submodule("linear1").weight).is_pinned()
    mover.close()
