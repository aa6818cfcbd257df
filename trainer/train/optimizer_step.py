"""The optimizer's step when memory runs out in it, which happens where its state is made: in the first one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.train.memory_room import HalfTakenStep
from trainer.train.state_saver import set_optimizer


class OptimizerStep:
    """Takes the step through the scaler. `make_room(what, reason)` frees memory, or raises; None only lets errors pass.

    Before the first step the weights, their gradients and what state there is are kept in main memory: an optimizer that runs out of
    memory has changed some of them already, and the step is taken anew from there. Later steps allocate nothing that the
    first did not; where memory runs out all the same, some weights have taken the step and others not.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        parameters: Sequence[nn.Parameter],
        make_room: Callable[[str, str], None] | None,
    ) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._parameters = list(parameters)
        self._make_room = make_room
        self._is_first = True

    def __call__(self) -> None:
        """Raises `NoRoom` (exit code 3) where memory runs out and none can be made, `HalfTakenStep` after the first step."""
        before = _Copy(self._optimizer, self._parameters) if self._is_first and self._make_room is not None else None
        while True:
            try:
                self._scaler.step(self._optimizer)
                break
            except torch.OutOfMemoryError as error:
                if self._make_room is None:
                    raise
                reason = str(error)
            if before is None:
                first = (reason.strip().splitlines() or [""])[0]
                raise HalfTakenStep(
                    f"the device ran out of memory in the optimizer's step ({first}); some weights have taken this step and "
                    "others not",
                    hint="Close other programs on this device, or raise blocks_to_swap; then resume from the last state.",
                )
            before.restore()
            self._make_room("the optimizer's step", reason)
        self._is_first = False


class _Copy:
    """Weights, gradients and optimizer state in main memory."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        # Some optimizers change them in place too.
        self._gradients = [
            None if parameter.grad is None else parameter.grad.detach().to("cpu", copy=True) for parameter in parameters
        ]
        self._state: dict[str, Any] = copy.deepcopy(_on_host(optimizer.state_dict()))

    def restore(self) -> None:
        """Also frees what state the failed step has made."""
        with torch.no_grad():
            for parameter, weight, gradient in zip(self._parameters, self._weights, self._gradients, strict=True):
                parameter.copy_(weight)
                if parameter.grad is not None and gradient is not None:
                    parameter.grad.copy_(gradient)
        # A copy: the optimizer's own state would else be what was kept, where it lives in main memory.
        set_optimizer(self._optimizer, copy.deepcopy(self._state), {})


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_host(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_on_host(one) for one in value]
    return value
