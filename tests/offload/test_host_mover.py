"""The mover for CPUs: what lies where, and that nothing is lost on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.offload.mover import CudaMover, HostMover, make_mover


@pytest.fixture
def blocks() -> dict[int, list[nn.Parameter]]:
    """Three blocks of two weights each, of two types and sizes."""
    generator = torch.Generator().manual_seed(3)

    def weight(rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.randn(rows, columns, generator=generator).to(dtype), requires_grad=False)

    return {key: [weight(3, 5 + key, torch.bfloat16), weight(4, 7, torch.float32)] for key in range(3)}


def test_a_fetched_block_lies_in_its_slot_with_its_values_and_an_evicted_one_in_main_memory(
    blocks: dict[int, list[nn.Parameter]],
) -> None:
    values = {key: [weight.detach().clone() for weight in weights] for key, weights in blocks.items()}
    mover = HostMover(torch.device("cpu"))
    mover.take(blocks, 2)
    at_home = {key: [weight.data_ptr() for weight in weights] for key, weights in blocks.items()}
    assert mover.resident() == frozenset()
    mover.fetch(0, 0)
    mover.fetch(1, 1)
    mover.wait(0)
    assert mover.resident() == {0, 1}
    assert mover.resident_bytes() == sum(weight.nbytes for key in (0, 1) for weight in blocks[key])
    assert blocks[0][0].data_ptr() != at_home[0][0]
    mover.evict(0)
    assert mover.resident() == {1}
    mover.fetch(2, 0)
    for key, weights in blocks.items():
        for weight, value in zip(weights, values[key], strict=True):
            assert torch.equal(weight, value), key
    mover.close()
    assert mover.resident_bytes() == 0
    for key, weights in blocks.items():
        assert [weight.data_ptr() for weight in weights] == at_home[key]
        for weight, value in zip(weights, values[key], strict=True):
            assert torch.equal(weight, value), key


def test_the_weights_of_one_slot_do_not_overlap_and_are_aligned(blocks: dict[int, list[nn.Parameter]]) -> None:
    mover = HostMover(torch.device("cpu"))
    mover.take(blocks, 1)
    mover.fetch(2, 0)
    first, second = blocks[2]
    assert second.data_ptr() - first.data_ptr() == 256
    first.fill_(7)
    assert not (second == 7).any()


def test_devices_without_streams_get_the_mover_that_copies_at_once() -> None:
    mover = make_mover(torch.device("cpu"))
    assert isinstance(mover, HostMover)
    assert not isinstance(mover, CudaMover)
