"""An optimizer's first step that runs out of memory is taken anew from exactly where it began."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.train.memory_room import HalfTakenStep
from trainer.train.optim import create_optimizer
from trainer.train.optimizer_step import OptimizerStep

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Steps:
    """Steps of an optimizer of which call number `fails_in` changes everything and then runs out of memory."""

    def __init__(self, optimizer_type: str, monkeypatch: pytest.MonkeyPatch, *, fails_in: int | None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.parameter = nn.Parameter(torch.randn(4, 8, generator=generator).bfloat16())
        self._gradient = torch.randn(4, 8, generator=generator).bfloat16()
        optimizer = create_optimizer(
            optimizer_type, [{"params": [self.parameter]}], learning_rate=0.01, arguments={"weight_decay": 0.1}
        )
        self.optimizer = optimizer
        self.num_calls = 0
        step = optimizer.step

        def broken() -> None:
            self.num_calls += 1
            step()
            if self.num_calls == fails_in:
                raise torch.OutOfMemoryError(MESSAGE)

        monkeypatch.setattr(optimizer, "step", broken)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self._step = OptimizerStep(optimizer, scaler, [self.parameter], lambda *_: None)

    def __call__(self, count: int) -> torch.Tensor:
        for _ in range(count):
            self.parameter.grad = self._gradient.clone()
            self._step()
        return self.parameter.detach().clone()


@pytest.mark.parametrize("optimizer_type", ["AdamW", "AdamWScheduleFree", "Prodigy", "Adafactor"])
def test_the_first_step_taken_anew_gives_the_weights_of_one_that_had_room(
    optimizer_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = Steps(optimizer_type, monkeypatch, fails_in=None)
    short = Steps(optimizer_type, monkeypatch, fails_in=1)
    assert torch.equal(short(3), plenty(3))
    assert short.num_calls == 4
    states = [steps.optimizer.state[steps.parameter] for steps in (short, plenty)]
    types = [{name: getattr(value, "dtype", None) for name, value in state.items()} for state in states]
    assert types[0] == types[1]


def test_state_that_was_there_before_keeps_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run's."""
    steps = Steps("SGDNesterov", monkeypatch, fails_in=1)
    momentum = torch.full((4, 8), 1 / 3)
    steps.optimizer.state[steps.parameter]["momentum_buffer"] = momentum.clone()
    steps.optimizer.state[steps.parameter]["untouched"] = momentum
    steps(1)
    assert torch.equal(steps.optimizer.state[steps.parameter]["untouched"], torch.full((4, 8), 1 / 3))


def test_a_later_step_that_breaks_off_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HalfTakenStep, match="some weights have taken this step"):
        Steps("AdamW", monkeypatch, fails_in=2)(2)
