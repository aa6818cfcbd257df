"""Block swap on a CPU: the numbers of no swap, few blocks resident, each brought in before its turn and never twice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tests.offload.poison_mover import PoisonMover
from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.model.packing import image_ids, text_ids
from trainer.model.weights import load_flux
from trainer.offload.block_swap import NUM_SLOTS, BlockSwap, spread, swapped_blocks
from trainer.offload.mover import HostMover
from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args
from trainer.tools.tiny_models import make_flux

NUM_TEXT = 5
ROWS, COLUMNS = 3, 4


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(
        tmp_path_factory.mktemp("flux") / "flux.safetensors",
        hidden=32,
        heads=2,
        depth=4,
        depth_single=8,
        context_in_dim=16,
        vec_in_dim=8,
    )


class Training:
    """A model with a LoRA that is not zero, and one fixed batch."""

    def __init__(self, flux_file: Path, spec: LoraSpec | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        self.model: Flux = load_flux(flux_file, dtype, "cpu")
        self.network = LoraNetwork.attach(
            self.model, None, spec or LoraSpec(rank=4, alpha=4), torch.Generator().manual_seed(1)
        )
        self.network.train()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        params = self.model.params
        self.img = torch.randn(1, ROWS * COLUMNS, params.in_channels, generator=generator)
        self.txt = torch.randn(1, NUM_TEXT, params.context_in_dim, generator=generator)
        self.y = torch.randn(1, params.vec_in_dim, generator=generator)

    def forward(self) -> Tensor:
        return self.model(
            self.img,
            image_ids(ROWS, COLUMNS),
            self.txt,
            text_ids(NUM_TEXT),
            torch.tensor([0.6]),
            self.y,
            torch.tensor([1.0]),
        )

    def micro_step(self) -> float:
        loss = self.forward().float().square().mean()
        loss.backward()
        return loss.item()

    def gradients(self) -> list[Tensor]:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return [cast("Tensor", parameter.grad).clone() for parameter in trained]

    def swap(self, count: int, mover: PoisonMover | HostMover) -> BlockSwap:
        blocks = (list(self.model.double_blocks), list(self.model.single_blocks))
        return BlockSwap(*blocks, count, mover)


def hooks_of(block: nn.Module, kind: str) -> dict[int, object]:
    """torch tells only through these private attributes which hooks a module has."""
    return getattr(block, kind)


def plain(training: Training) -> None:
    training.micro_step()


def checkpointed(training: Training) -> None:
    training.model.enable_gradient_checkpointing()
    training.micro_step()


def accumulated(training: Training) -> None:
    training.micro_step()
    training.img = training.img * 0.5
    training.micro_step()


def with_samples_in_between(training: Training) -> None:
    with torch.no_grad():
        training.forward()
    training.micro_step()
    with torch.no_grad():
        training.forward()
        training.forward()
    training.micro_step()


def with_inputs_that_need_a_gradient(training: Training) -> None:
    for tensor in (training.img, training.txt, training.y):
        tensor.requires_grad_()
    training.micro_step()


def with_a_forward_pass_thrown_away(training: Training) -> None:
    training.forward()
    training.micro_step()


def after_an_error_in_the_middle(training: Training) -> None:
    block = training.model.single_blocks[5]

    def fail(*_: object) -> None:
        raise RuntimeError("broken off")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        training.micro_step()
    handle.remove()
    training.micro_step()


def under_autocast(training: Training) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        training.micro_step()


COURSES: tuple[Callable[[Training], None], ...] = (
    plain,
    checkpointed,
    accumulated,
    with_samples_in_between,
    with_inputs_that_need_a_gradient,
    with_a_forward_pass_thrown_away,
    after_an_error_in_the_middle,
    under_autocast,
)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("course", COURSES)
def test_gradients_are_those_of_no_swap_bit_by_bit(
    flux_file: Path, course: Callable[[Training], None], count: int
) -> None:
    usual = Training(flux_file)
    course(usual)
    swapped = Training(flux_file)
    mover = PoisonMover()
    with swapped.swap(count, mover):
        course(swapped)
    for expected, found in zip(usual.gradients(), swapped.gradients(), strict=True):
        assert torch.equal(expected, found)
    assert mover.most_resident <= NUM_SLOTS


@pytest.mark.parametrize(
    "network_args",
    [["train_blocks=single"], ["train_double_block_indices=1", "train_single_block_indices=6"], ["in_dims=2,2,2,2,2"]],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_on_some_layers_gets_the_gradients_of_no_swap(
    flux_file: Path, network_args: list[str], checkpointing: bool
) -> None:
    spec = spec_from_network_args(network_args, network_dim=2)
    results: list[list[Tensor]] = []
    for count in (0, 4):
        training = Training(flux_file, spec)
        training.model.enable_gradient_checkpointing(checkpointing)
        if count:
            with training.swap(count, PoisonMover()):
                training.micro_step()
        else:
            training.micro_step()
        results.append(training.gradients())
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


def test_the_poison_shows_when_a_block_is_not_fetched(flux_file: Path) -> None:
    """The tests above prove something only when a weight that is away does spoil the result."""
    training = Training(flux_file)
    mover = PoisonMover()
    with training.swap(3, mover):
        away = [parameter for block in mover.stored() for parameter in block]
        assert all(parameter.isnan().all() for parameter in away)
        for block in training.model.blocks():
            hooks_of(block, "_forward_pre_hooks").clear()
        assert training.forward().isnan().all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_come_in_the_order_of_their_turns_and_none_comes_twice(flux_file: Path, checkpointing: bool) -> None:
    training = Training(flux_file)
    training.model.enable_gradient_checkpointing(checkpointing)
    mover = PoisonMover()
    with training.swap(4, mover) as swap:
        count = swap.num_swapped
        assert count == 2 + 4
        assert mover.transfers == [0, 1]
        training.micro_step()
        there_and_back = [0, 1, *range(2, count), *reversed(range(count - 2))]
        assert mover.transfers == there_and_back
        mover.calls.clear()
        training.micro_step()
        assert mover.transfers == there_and_back[2:], "the first two lie where the last pass left them"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_work_between_the_order_to_bring_a_block_and_its_need(flux_file: Path, checkpointing: bool) -> None:
    """That work hides the copy."""
    training = Training(flux_file)
    training.model.enable_gradient_checkpointing(checkpointing)
    mover = PoisonMover()
    with training.swap(4, mover):
        training.micro_step()
        mover.calls.clear()
        for parameter in training.network.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: mover.calls.append(("work", -1)))
        for block in training.model.blocks():
            block.register_forward_hook(lambda *_: mover.calls.append(("work", -1)))
        training.micro_step()
    orders = [(position, key) for position, (kind, key) in enumerate(mover.calls) if kind == "fetch"]
    assert len(orders) == 2 * (6 - NUM_SLOTS)
    for position, fetched in orders:
        following = [kind for kind, key in mover.calls[position + 1 :] if kind == "work" or key == fetched]
        assert following[0] == "work", f"block {fetched} is needed as soon as it is asked for"


def test_sampling_brings_each_block_once_a_pass(flux_file: Path) -> None:
    training = Training(flux_file)
    mover = PoisonMover()
    with training.swap(4, mover) as swap, torch.no_grad():
        training.forward()
        mover.calls.clear()
        training.forward()
        assert sorted(mover.transfers) == list(range(swap.num_swapped))


def test_after_the_swap_all_weights_are_back_and_no_hook_is_left(flux_file: Path) -> None:
    training = Training(flux_file)
    before = {name: parameter.clone() for name, parameter in training.model.named_parameters()}
    objects = dict(training.model.named_parameters())
    with training.swap(4, PoisonMover()):
        training.micro_step()
    after = dict(training.model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter is objects[name], "an optimizer would hold on to another tensor"
        assert torch.equal(parameter, before[name]), name
    for block in training.model.blocks():
        assert not hooks_of(block, "_forward_hooks")
        assert not hooks_of(block, "_forward_pre_hooks")


def test_a_swap_that_is_attached_twice_is_a_mistake_of_the_caller(flux_file: Path) -> None:
    with (
        Training(flux_file).swap(1, HostMover(torch.device("cpu"))) as swap,
        pytest.raises(ValueError, match="already"),
    ):
        swap.attach()


def test_only_frozen_weights_travel_and_at_most_two_blocks_are_resident(flux_file: Path) -> None:
    training = Training(flux_file, dtype=torch.bfloat16)
    mover = PoisonMover()
    trained = {id(parameter) for parameter in training.network.parameters()}
    with training.swap(4, mover):
        largest = max(
            sum(linear.weight.nbytes for linear in block.modules() if isinstance(linear, nn.Linear))
            for block in training.model.blocks()
        )
        assert 0 < mover.resident_bytes() <= NUM_SLOTS * largest
        moved = {id(parameter) for block in mover.stored() for parameter in block}
    assert not moved & trained
    assert len(moved) == 2 * 10 + 4 * 3, "the matrices of 2 double blocks with 10 and 4 single blocks with 3"


@pytest.mark.parametrize(
    ("depth", "depth_single", "count", "double", "single"),
    [
        (19, 38, 0, [], []),
        (19, 38, 1, [], [9, 28]),
        (4, 8, 3, [2], [1, 3, 5, 7]),
        (19, 38, 38, list(range(19)), list(range(38))),
    ],
)
def test_the_count_stands_for_half_as_many_double_and_the_rest_twice_as_single_blocks(
    depth: int, depth_single: int, count: int, double: list[int], single: list[int]
) -> None:
    assert swapped_blocks(depth, depth_single, count) == (double, single)


def test_18_blocks_are_9_double_and_18_single_ones_with_gaps_as_even_as_can_be() -> None:
    double, single = swapped_blocks(19, 38, 18)
    assert (len(double), len(single)) == (9, 18)
    for blocks in (double, single):
        assert {later - earlier for earlier, later in pairwise(blocks)} <= {2, 3}
    assert spread(3, 9) == [1, 4, 7]


def test_too_many_blocks_get_an_error_that_names_the_largest_count() -> None:
    with pytest.raises(UserError, match="2 double and 4 single") as caught:
        swapped_blocks(2, 4, 18)
    assert caught.value.problems[0].hint == "The largest allowed is 4."
    assert caught.value.exit_code == 2


def test_the_number_of_swapped_blocks_may_change_between_two_passes(flux_file: Path) -> None:
    expected = Training(flux_file)
    expected.micro_step()
    training = Training(flux_file)
    with training.swap(1, HostMover(torch.device("cpu"))) as swap:
        for count, num_swapped in ((8, 12), (2, 3), (0, 0), (3, 5)):
            swap.change(count)
            assert (swap.blocks_to_swap, swap.num_swapped) == (count, num_swapped)
            for parameter in training.network.parameters():
                parameter.grad = None
            training.micro_step()
            assert all(map(torch.equal, training.gradients(), expected.gradients())), count
        assert swap.largest == 8
    weights = zip(training.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)


def test_a_swap_of_no_blocks_does_nothing(flux_file: Path) -> None:
    training = Training(flux_file)
    mover = PoisonMover()
    with training.swap(0, mover):
        training.micro_step()
    assert mover.calls == []
