"""Every optimizer goes on from its stored state to the same bits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from trainer.schema.optimizers import OPTIMIZERS
from trainer.train.optim import create_optimizer
from trainer.train.state_saver import set_optimizer
from trainer.train.state_tree import pack, unpack


def weights(seed: int) -> list[nn.Parameter]:
    """One tensor that 8-bit optimizers keep in 8 bit, and one that they do not."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 80), (8, 5))]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_is_stored_and_set_again_goes_on_to_the_same_bits(name: str) -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        group: dict[str, object] = {"params": parameters, "lr": 0.5, "name": "unet"}
        return create_optimizer(name, [group], learning_rate=0.5, arguments={})

    parameters, others = weights(1), weights(2)
    optimizer = make(parameters)
    take_steps(optimizer, parameters, range(3))
    tree, tensors = pack({"state": optimizer.state_dict(), "defaults": optimizer.defaults})
    saved: Any = unpack(json.loads(json.dumps(tree, allow_nan=False)), tensors)
    with torch.no_grad():
        for other, parameter in zip(others, parameters, strict=True):
            other.copy_(parameter)
    again = make(others)
    set_optimizer(again, saved["state"], saved["defaults"])
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(again, others, range(3, 6))
    for other, parameter in zip(others, parameters, strict=True):
        assert torch.equal(other, parameter)
