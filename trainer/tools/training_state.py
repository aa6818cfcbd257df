"""Where a training of the demo's models stands, kept in one file so that it can be broken off and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn


class TrainingState:
    """Models and an optimizer with the file that holds their state."""

    def __init__(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
    ) -> None:
        self._path = path
        self._model = model
        self._optimizer = optimizer
        self._average = average

    def save(self, step: int) -> None:
        """Write the state after `step` steps, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        state: dict[str, object] = {
            "step": step,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        if self._average is not None:
            state["average"] = self._average.state_dict()
        torch.save(state, part)
        part.replace(self._path)

    def resume(self) -> int:
        """Load the file if there is one; returns the number of steps done."""
        if not self._path.is_file():
            return 0
        state = cast("dict[str, object]", torch.load(self._path, weights_only=True))
        self._model.load_state_dict(cast("dict[str, torch.Tensor]", state["model"]))
        self._optimizer.load_state_dict(cast("dict[str, object]", state["optimizer"]))
        if self._average is not None:
            self._average.load_state_dict(cast("dict[str, torch.Tensor]", state["average"]))
        return cast("int", state["step"])
