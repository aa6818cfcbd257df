"""The Chroma transformer: its layouts, what checkpointing and block swap change (nothing), its LoRA, its size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.diffusers_flux import diffusers_names
from tests.offload.poison_mover import PoisonMover
from trainer.lora.network import LoraNetwork
from trainer.model.chroma import Chroma
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.transformer import load_transformer
from trainer.model.weights import load_chroma
from trainer.offload.block_swap import BlockSwap
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.chroma_header import ChromaParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.parameter_counts import flux_counts
from trainer.tools.tiny_models import make_chroma

DEV = FluxParams(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, True)
SCHNELL = FluxParams(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, False)
CHROMA = ChromaParams(64, 64, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, 64, 5120, 5)
LENGTHS = (4, 7)


@pytest.fixture(scope="module")
def chroma_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chroma(tmp_path_factory.mktemp("chroma") / "chroma.safetensors", hidden=48, heads=2, depth=3)


def inputs(model: Chroma) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "img": torch.randn(2, 12, model.params.in_channels, generator=generator),
        "img_ids": image_ids(3, 4),
        "txt": torch.randn(2, 9, model.params.context_in_dim, generator=generator),
        "txt_ids": text_ids(9),
        "timesteps": torch.tensor([0.2, 0.7]),
        "guidance": torch.zeros(2),
        "txt_attention_mask": (torch.arange(9)[None] < torch.tensor(LENGTHS)[:, None]).long(),
    }


def test_published_sizes_on_the_meta_device() -> None:
    """Chroma1's file of 17.8 GB holds 8.9 thousand million bf16 numbers."""
    for build, number in (
        (lambda: Flux(DEV), 11_901_408_320),
        (lambda: Flux(SCHNELL), 11_891_178_560),
        (lambda: Chroma(CHROMA), 8_899_983_424),
    ):
        with torch.device("meta"):
            model = build()
        assert all(parameter.is_meta for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) == number
        assert flux_counts(model.params).total == number


def test_all_344_modulation_vectors_are_used_in_the_published_order() -> None:
    assert CHROMA.num_modulation_vectors == 344 == 38 * 3 + 19 * 12 + 2


def test_counts_per_block_are_those_of_the_modules(chroma_file: Path) -> None:
    model = load_chroma(chroma_file, torch.float32, "cpu")
    counts = flux_counts(model.params)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    for block, linear, other in (
        (model.double_blocks[0], counts.double_linear, counts.double_other),
        (model.single_blocks[0], counts.single_linear, counts.single_other),
    ):
        matrices = [parameter.numel() for parameter in block.parameters() if parameter.dim() == 2]
        assert sum(matrices) == linear
        assert sum(parameter.numel() for parameter in block.parameters()) == linear + other


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_layout_loads_to_the_same_weights(chroma_file: Path, tmp_path: Path, prefix: str) -> None:
    model = load_chroma(chroma_file, torch.float32, "cpu")
    state = model.state_dict()
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "published.safetensors")
    renamed = diffusers_names(state, model.params.hidden_size)
    save_file(
        {prefix + name: tensor.contiguous() for name, tensor in renamed.items()}, tmp_path / "diffusers.safetensors"
    )
    for name in ("published", "diffusers"):
        again = load_transformer(tmp_path / f"{name}.safetensors", "chroma", torch.float32, "cpu")
        assert set(again.state_dict()) == set(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_masked_text_does_not_reach_the_image_and_visible_padding_does(chroma_file: Path) -> None:
    model = load_chroma(chroma_file, torch.float32, "cpu")
    given = inputs(model)
    with torch.no_grad():
        expected = model(**given)
        changed = given["txt"].clone()
        changed[0, LENGTHS[0] :] = 7.0
        assert torch.equal(model(**(given | {"txt": changed})), expected)
        changed[0, LENGTHS[0] - 1] = 7.0
        difference = (model(**(given | {"txt": changed})) - expected).abs()
    assert difference[0].max() > 1e-3
    assert difference[1].max() == 0


def test_guidance_reaches_every_block_through_the_approximator(chroma_file: Path) -> None:
    model = load_chroma(chroma_file, torch.float32, "cpu")
    with torch.no_grad():
        none = model.modulation_vectors(torch.tensor([0.3]), torch.tensor([0.0]))
        some = model.modulation_vectors(torch.tensor([0.3]), torch.tensor([3.5]))
    assert none.shape == (1, model.params.num_modulation_vectors, model.params.hidden_size)
    assert ((none - some).abs().amax(dim=-1) > 1e-4).all()
    # Each vector has its own index: no two are alike.
    assert torch.unique(none[0], dim=0).shape[0] == model.params.num_modulation_vectors


def trained_gradients(chroma_file: Path, *, blocks_to_swap: int, is_checkpointed: bool) -> list[Tensor]:
    model = load_chroma(chroma_file, torch.float32, "cpu")
    network = LoraNetwork.attach(model, None, LoraSpec(rank=4, alpha=4), torch.Generator().manual_seed(1))
    assert len(network.names) == 3 * 8 + 4 * 2
    assert not any("mod" in name or "guidance" in name for name in network.names)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.enable_gradient_checkpointing(is_checkpointed)
    given = inputs(model)
    doubles, singles = list(model.double_blocks), list(model.single_blocks)
    if blocks_to_swap:
        with BlockSwap(doubles, singles, blocks_to_swap, PoisonMover()):
            model(**given).square().mean().backward()
    else:
        model(**given).square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize(("blocks_to_swap", "is_checkpointed"), [(0, True), (2, False), (3, True)])
def test_swap_and_checkpointing_change_no_gradient(
    chroma_file: Path, blocks_to_swap: int, is_checkpointed: bool
) -> None:
    plain = trained_gradients(chroma_file, blocks_to_swap=0, is_checkpointed=False)
    other = trained_gradients(chroma_file, blocks_to_swap=blocks_to_swap, is_checkpointed=is_checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    # The last block's text update reaches no output: its gradient may be zero, but most are not.
    assert math.fsum(float(gradient.abs().max() > 0) for gradient in plain) >= 0.8 * len(plain)
