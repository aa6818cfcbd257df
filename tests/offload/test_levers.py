"""What trades memory for time changes no result: inputs that wait in main memory, blocks that are not checkpointed, modulation
weights off the device, compiled blocks; each with the block swap, and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.offload.poison_mover import PoisonMover
from tests.offload.test_block_swap import Training
from trainer.model.compiled import compile_blocks
from trainer.model.flux import Flux
from trainer.model.host_linear import HostLinear, count_mapped
from trainer.model.joint import run_again_in_backward
from trainer.model.stored_linear import PackedStorage
from trainer.model.weights import ModulationOnHost, load_flux
from trainer.offload.activations import OffloadedCheckpoint
from trainer.offload.courier import Courier
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args
from trainer.tools.tiny_models import make_flux

CPU = torch.device("cpu")
NUM_BLOCKS = 12


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    return make_flux(path, hidden=32, heads=2, depth=4, depth_single=8, context_in_dim=16, vec_in_dim=8)


@pytest.fixture(scope="module")
def expected(flux_file: Path) -> list[Tensor]:
    training = Training(flux_file)
    training.micro_step()
    return training.gradients()


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# ---- inputs of the blocks in main memory ----


@pytest.mark.parametrize("swap", [0, 4])
def test_block_inputs_that_wait_in_main_memory_give_the_same_gradients_and_travel_once_each_way(
    flux_file: Path, expected: list[Tensor], swap: int
) -> None:
    training = Training(flux_file)
    offloaded = OffloadedCheckpoint(CPU)
    training.model.enable_gradient_checkpointing(run=offloaded)
    with training.swap(swap, PoisonMover()):
        training.micro_step()
    assert same(training.gradients(), expected)
    num_tokens = training.img.shape[1] + training.txt.shape[1]
    assert offloaded.num_bytes_out == NUM_BLOCKS * num_tokens * training.model.params.hidden_size * 4
    assert offloaded.num_bytes_in == offloaded.num_bytes_out


def test_the_second_run_of_an_offloaded_block_draws_the_dropout_of_the_first(
    flux_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[object, ...]] = []

    def spy(run: Callable[..., object], *arguments: object, use_reentrant: bool) -> object:
        given.append(arguments)
        return checkpoint(run, *arguments, use_reentrant=use_reentrant)

    monkeypatch.setattr("trainer.offload.activations.checkpoint", spy)
    results: list[list[Tensor]] = []
    for offloads in (False, True):
        training = Training(flux_file, LoraSpec(rank=4, alpha=4, dropout=0.3))
        if offloads:
            training.model.enable_gradient_checkpointing(run=OffloadedCheckpoint(CPU))
        torch.manual_seed(3)
        training.micro_step()
        results.append(training.gradients())
    assert same(*results)
    assert len(given) == NUM_BLOCKS
    # Of a GPU torch keeps the random state only where it is given one of its tensors.
    assert all(any(isinstance(one, Tensor) for one in arguments) for arguments in given)


def test_no_input_of_an_offloaded_block_stays_where_it_was(flux_file: Path) -> None:
    left: dict[bool, int] = {}
    for offloads in (False, True):
        training = Training(flux_file)
        storages: list[StorageWeakRef] = []

        def see(_block: nn.Module, inputs: tuple[Tensor, ...], found: list[StorageWeakRef] = storages) -> None:
            found.append(StorageWeakRef(inputs[0].untyped_storage()))

        for block in training.model.blocks():
            block.register_forward_pre_hook(see)
        run = OffloadedCheckpoint(CPU) if offloads else run_again_in_backward
        training.model.enable_gradient_checkpointing(run=run)
        loss = training.forward().square().mean()
        left[offloads] = sum(not storage.expired() for storage in storages)
        loss.backward()
    assert left == {False: NUM_BLOCKS, True: 0}


@pytest.mark.parametrize("course", ["two passes at once", "a pass thrown away", "no gradients"])
def test_offloaded_inputs_of_other_courses(flux_file: Path, course: str) -> None:
    results: list[list[Tensor]] = []
    for run in (None, OffloadedCheckpoint(CPU)):
        training = Training(flux_file)
        if run is not None:
            training.model.enable_gradient_checkpointing(run=run)
        if course == "two passes at once":
            first = training.forward().square().mean()
            training.img = 0.5 * training.img
            second = training.forward().square().mean()
            first.backward()
            second.backward()
        elif course == "a pass thrown away":
            training.forward()
            training.micro_step()
        else:
            with torch.no_grad():
                training.forward()
            training.micro_step()
        results.append(training.gradients())
    assert same(*results)


# ---- the LoRA's part ----


def test_the_lora_of_a_fused_linear_is_one_product_down_and_one_up(flux_file: Path) -> None:
    linear = Training(flux_file).model.single_blocks[0].get_submodule("linear1")

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> object:
            self.count += "mm" in func.overloadpacket.__name__
            return func(*args, **(kwargs or {}))

    with Products() as products:
        linear(torch.zeros(5, 32, requires_grad=True))
    assert products.count == 1 + 2, "the base's, down and up"


# ---- some blocks only ----


@pytest.mark.parametrize("count", [0, 1, 6, 12])
def test_so_many_blocks_compute_twice_and_the_gradients_are_the_same(
    flux_file: Path, expected: list[Tensor], count: int
) -> None:
    training = Training(flux_file)
    training.model.enable_gradient_checkpointing(num_blocks=count)
    runs = [0] * NUM_BLOCKS
    for index, block in enumerate(training.model.blocks()):

        def count_run(*_: object, index: int = index) -> None:
            runs[index] += 1

        block.register_forward_pre_hook(count_run)
    with training.swap(3, PoisonMover()):
        training.micro_step()
    assert same(training.gradients(), expected)
    assert runs == [2] * count + [1] * (NUM_BLOCKS - count)


# ---- modulation off the device ----


class Poisoned(Courier):
    """Gives the same memory for every weight of a size: what is kept too long is spoilt."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._places: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        self.num_bytes += weight.nbytes
        place = self._places.setdefault(tuple(weight.shape), torch.empty_like(weight))
        return place.copy_(weight)


class ModulationTraining(Training):
    def __init__(self, flux_file: Path, *, maps_file: bool, spec: LoraSpec | None = None, bf16: bool = False) -> None:
        self.courier = Poisoned()
        plain = load_flux

        def load(path: Path, dtype: torch.dtype, device: str) -> Flux:
            return plain(path, dtype, device, modulation=ModulationOnHost(self.courier, maps_file))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.offload.test_block_swap.load_flux", load)
            super().__init__(flux_file, spec, dtype=torch.bfloat16 if bf16 else torch.float32)

    @property
    def modulation_bytes(self) -> int:
        return sum(module.weight.nbytes for module in self.model.modules() if isinstance(module, HostLinear))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("maps_file", [False, True])
@pytest.mark.parametrize("network_args", [(), ("in_dims=2,2,2,2,2",), ("dora=1",)])
def test_modulation_off_the_device_gives_the_same_gradients_and_comes_once_a_step(
    flux_file: Path, network_args: tuple[str, ...], maps_file: bool, checkpointing: bool
) -> None:
    spec = spec_from_network_args(list(network_args), network_dim=2, network_alpha=2)
    usual = Training(flux_file, spec)
    training = ModulationTraining(flux_file, maps_file=maps_file, spec=spec)
    for one in (usual, training):
        one.model.enable_gradient_checkpointing(checkpointing)
        one.micro_step()
    assert same(training.gradients(), usual.gradients()) or network_args != ()
    for found, wanted in zip(training.gradients(), usual.gradients(), strict=True):
        # Where something before the modulation trains, its gradient is summed in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    # This file is bf16: only where that is the computing type can it be mapped.
    assert count_mapped(training.model) == (0, 2 * 4 + 8)
    if network_args == ():
        assert training.courier.num_bytes == training.modulation_bytes


def test_a_mapped_modulation_is_the_file_itself_and_gives_the_same_gradients(flux_file: Path) -> None:
    usual = Training(flux_file, dtype=torch.bfloat16)
    training = ModulationTraining(flux_file, maps_file=True, bf16=True)
    content = flux_file.read_bytes()
    for one in (usual, training):
        with torch.autocast("cpu", torch.bfloat16), one.swap(4, PoisonMover()):
            one.micro_step()
            one.micro_step()
    assert same(training.gradients(), usual.gradients())
    num_mapped, num_all = count_mapped(training.model)
    assert num_mapped == num_all == 2 * 4 + 8
    assert training.courier.num_bytes == 2 * training.modulation_bytes
    assert flux_file.read_bytes() == content


def test_with_modulation_off_the_device_swapped_blocks_are_the_smaller(flux_file: Path) -> None:
    def swapped(training: Training) -> int:
        mover = PoisonMover()
        with training.swap(4, mover):
            return sum(parameter.nbytes for block in mover.stored() for parameter in block)

    whole, rest = Training(flux_file), ModulationTraining(flux_file, maps_file=False)
    dim = whole.model.params.hidden_size
    assert swapped(whole) - swapped(rest) == 4 * (2 * 12 + 4 * 3) * dim * dim


# ---- compiled blocks ----


def compiled(training: Training, dynamo_backend: str = "aot_eager") -> Training:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    torch._dynamo.utils.counters.clear()  # pyright: ignore[reportPrivateUsage]
    compile_blocks(training.model, backend=dynamo_backend)
    assert torch._dynamo.config.recompile_limit >= 64  # pyright: ignore[reportPrivateUsage]
    return training


@pytest.mark.parametrize("way", ["plain", "swapped, offloaded, modulation outside"])
def test_compiled_blocks_give_the_same_gradients_but_for_rounding(
    flux_file: Path, expected: list[Tensor], way: str
) -> None:
    if way == "plain":
        training = compiled(Training(flux_file))
        training.micro_step()
    else:
        training = compiled(ModulationTraining(flux_file, maps_file=False))
        training.model.enable_gradient_checkpointing(run=OffloadedCheckpoint(CPU))
        with training.swap(4, PoisonMover()):
            training.micro_step()
    largest = max(float(tensor.abs().max()) for tensor in expected)
    for found, wanted in zip(training.gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * largest)
    counters = torch._dynamo.utils.counters  # pyright: ignore[reportPrivateUsage]
    assert not counters["graph_break"]
    # The first double block's streams need no gradient.
    assert counters["stats"]["unique_graphs"] == 3, "blocks of one kind share what is compiled"


def test_a_storage_can_be_compiled(flux_file: Path) -> None:
    results: list[list[Tensor]] = []
    for is_compiled in (False, True):
        training = stored_training(flux_file, "fp8")
        if is_compiled:
            compiled(training)
        training.micro_step()
        results.append(training.gradients())
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def stored_training(flux_file: Path, storage: PackedStorage) -> Training:
    def load(path: Path, dtype: torch.dtype, device: str) -> Flux:
        return load_flux(path, dtype, device, storage=storage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.offload.test_block_swap.load_flux", load)
        return Training(flux_file)
