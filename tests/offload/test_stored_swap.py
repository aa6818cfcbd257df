"""Blocks stored in fewer bits: swapped or not they give the same gradients, move as many bytes as the storage has, and a LoRA
on them learns as on whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tests.lora.test_network_settings import fill
from tests.offload.poison_mover import PoisonMover
from trainer.lora.merge import merge_file, weight_change
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.stored_linear import PackedStorage, StoredLinear
from trainer.model.weights import load_flux
from trainer.offload.block_swap import NUM_SLOTS, BlockSwap, swapped_blocks
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args
from trainer.schema.storage import Storage, block_bytes
from trainer.tools.tiny_models import make_flux

STORAGES: tuple[PackedStorage, ...] = ("fp8", "int8", "nf4")
SETTINGS = [
    (["split_qkv=1"], "networks.lora_flux"),
    (["dora=1", "rank_dropout=0.3"], "networks.lora_flux"),
    (["dora=1", "dora_axis=out"], "networks.lora_flux"),
    (["pissa=1", "rslora=1"], "networks.lora_flux"),
    (["ggpo_sigma=0.1", "ggpo_beta=1"], "networks.lora_flux"),
    (["in_dims=2,2,2,2,2"], "networks.lora_flux"),
    (["enable_all_linear=1"], "networks.oft_flux"),
]


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    return make_flux(path, hidden=64, heads=2, depth=4, depth_single=8, context_in_dim=16, vec_in_dim=8)


def load(flux_file: Path, storage: Storage, dtype: torch.dtype = torch.float32) -> Flux:
    return load_flux(flux_file, dtype, "cpu", storage=None if storage == "compute" else storage)


def batch_of(model: Flux) -> tuple[Tensor, ...]:
    params, generator = model.params, torch.Generator().manual_seed(3)
    return (
        torch.randn(1, 16, params.in_channels, generator=generator),
        image_ids(4, 4),
        torch.randn(1, 6, params.context_in_dim, generator=generator),
        text_ids(6),
        torch.tensor([0.6]),
        torch.randn(1, params.vec_in_dim, generator=generator),
        torch.tensor([1.0]),
    )


def gradients(
    flux_file: Path,
    storage: Storage,
    mover: PoisonMover | None,
    *,
    settings: list[str] | None = None,
    module: str = "networks.lora_flux",
    checkpointing: bool = False,
    count: int = 4,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    model = load(flux_file, storage, dtype)
    model.enable_gradient_checkpointing(checkpointing)
    spec = spec_from_network_args(settings or [], network_dim=2, network_module=module)
    network = LoraNetwork.attach(model, None, spec, torch.Generator().manual_seed(1))
    fill(network, 2)
    network.train()
    given = batch_of(model)

    def step() -> None:
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            output = model(*given)
        output.float().square().mean().backward()
        network.before_step()

    if mover is None:
        step()
        step()
    else:
        with BlockSwap(list(model.double_blocks), list(model.single_blocks), count, mover):
            step()
            mover.bytes_to_device = 0
            step()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def same(first: list[Tensor], second: list[Tensor]) -> None:
    assert first
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("checkpointing", "dtype"),
    [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16), (True, torch.float16)],
)
def test_swapping_changes_no_gradient(
    flux_file: Path, storage: PackedStorage, checkpointing: bool, dtype: torch.dtype
) -> None:
    """All blocks are swapped here, in each type of computation."""
    still = gradients(flux_file, storage, None, checkpointing=checkpointing, dtype=dtype)
    same(gradients(flux_file, storage, PoisonMover(), checkpointing=checkpointing, dtype=dtype), still)


@pytest.mark.parametrize(("settings", "module"), SETTINGS)
@pytest.mark.parametrize("storage", ["fp8", "nf4"])
def test_every_kind_of_network(flux_file: Path, settings: list[str], module: str, storage: PackedStorage) -> None:
    still = gradients(flux_file, storage, None, settings=settings, module=module)
    same(gradients(flux_file, storage, PoisonMover(), settings=settings, module=module, checkpointing=True), still)


@pytest.mark.parametrize("storage", ["compute", *STORAGES])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_bytes_to_the_device_are_the_floor(flux_file: Path, storage: Storage, count: int) -> None:
    """Each swapped block once forward and once backward, but for those that are in the slots at the turns."""
    mover = PoisonMover()
    gradients(flux_file, storage, mover, count=count)
    model = load(flux_file, storage)
    double, single = block_bytes(model.params, storage, 4)
    num_double, num_single = (len(found) for found in swapped_blocks(4, 8, count))
    sizes = [double] * num_double + [single] * num_single
    assert mover.bytes_to_device == sum(sizes[NUM_SLOTS:]) + sum(sizes[:-NUM_SLOTS])


def test_fewer_bits_are_fewer_bytes_to_move(flux_file: Path) -> None:
    moved: dict[Storage, int] = {}
    for storage in ("compute", "fp8", "int8", "nf4"):
        mover = PoisonMover()
        gradients(flux_file, storage, mover, dtype=torch.bfloat16)
        moved[storage] = mover.bytes_to_device
    assert moved["int8"] == moved["fp8"]
    # The modulation, a third of a block, stays whole; small rows make their scales show.
    assert 0.64 < moved["fp8"] / moved["compute"] < 0.70
    assert 0.44 < moved["nf4"] / moved["compute"] < 0.53


def losses(flux_file: Path, storage: Storage, num_steps: int) -> list[float]:
    """A LoRA that learns the velocity of one picture."""
    model = load(flux_file, storage)
    network = LoraNetwork.attach(model, None, LoraSpec(rank=4, alpha=4), torch.Generator().manual_seed(1))
    network.train()
    given = batch_of(model)
    target = torch.randn(1, 16, model.params.out_channels, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-2)
    found: list[float] = []
    for _ in range(num_steps):
        loss = (model(*given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_lora_on_stored_weights_learns_as_on_whole_ones(flux_file: Path) -> None:
    whole = losses(flux_file, "compute", 20)
    assert whole[-1] < 0.7 * whole[0]
    for storage in STORAGES:
        found = losses(flux_file, storage, 20)
        # The courses part a little on the way and end at the same loss.
        for step, bound in ((0, 0.01), (10, 0.15), (19, 0.1)):
            assert found[step] == pytest.approx(whole[step], rel=bound), (storage, step)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_lora_is_merged_before_weights_are_stored(flux_file: Path, storage: PackedStorage) -> None:
    """A change that is smaller than the steps between stored numbers would be lost afterwards."""
    plain = load(flux_file, "compute")
    donor = LoraNetwork.attach(load(flux_file, "compute"), None, LoraSpec(rank=4, alpha=4), torch.Generator())
    fill(donor, 7)
    state = donor.published_state_dict(None)
    change_of = weight_change("unet", state, {}, 0.5, "a file")
    stored = load_flux(flux_file, torch.float32, "cpu", storage=storage, change_of=change_of)
    counts = [
        merge_file({"unet": model}, state, {}, 0.5, "a file", stored_are_merged=True)[0] for model in (plain, stored)
    ]
    assert counts[0] == counts[1] > 0
    for path, module in stored.named_modules():
        weight = plain.get_submodule(path).get_parameter("weight") if isinstance(module, nn.Linear) else None
        if isinstance(module, StoredLinear):
            packed, scale = module.pack(cast("Tensor", weight))
            assert torch.equal(packed.view(torch.uint8), module.weight.view(torch.uint8))
            assert torch.equal(scale, module.weight_scale)
        elif weight is not None:
            assert torch.equal(weight, module.get_parameter("weight"))
    with pytest.raises(UserError, match="cannot be merged into weights that are kept in 8 bit"):
        merge_file({"unet": stored}, state, {}, 0.5, "a file")
