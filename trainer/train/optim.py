"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

import torch

from trainer.schema.base import UserError

_IMPLEMENTATION_ARGUMENTS: Final = ("foreach", "fused")
_FUSED_DEVICES: Final = ("cpu", "cuda")


def create_optimizer(
    optimizer_type: str,
    groups: Sequence[dict[str, object]],
    *,
    learning_rate: float,
    arguments: Mapping[str, object],
) -> torch.optim.Optimizer:
    """`AdamW`, or `AdamW8bit` of bitsandbytes, over `groups` of parameters, which may bring an `lr` of their own.

    `arguments` are what `parse_optimizer_args` made of `optimizer_args`, which knows the settings of each. Raises
    `UserError` (exit code 2) for values that the optimizer refuses all the same. AdamW8bit keeps the state of tensors of
    4096 numbers and more in 8 bit and of smaller ones in 32 bit; it works on CPUs too, more slowly than AdamW.
    """
    try:
        if optimizer_type == "AdamW8bit":
            return _adamw8bit()(list(groups), lr=learning_rate, **arguments)
        if optimizer_type != "AdamW":
            raise AssertionError(f"{optimizer_type} is not an optimizer")
        if not any(name in arguments for name in _IMPLEMENTATION_ARGUMENTS) and _all_on_fused_devices(groups):
            # One kernel for all tensors of a LoRA's hundreds: a third of the loop's time on a CPU, a launch on a GPU.
            arguments = {**arguments, "fused": True}
        make_adamw = cast("Callable[..., torch.optim.Optimizer]", torch.optim.AdamW)
        return make_adamw(list(groups), lr=learning_rate, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        # The arguments are the only thing that a user gives: what an optimizer refuses is one of them.
        raise UserError(
            f"{optimizer_type} refuses its settings: {error}", "--optimizer_args", field="optimizer_args", exit_code=2
        ) from error


def optimizer_description(optimizer: torch.optim.Optimizer, arguments: Mapping[str, object]) -> str:
    """The optimizer as the metadata name it: class with module, then the user's arguments, if any."""
    kind = type(optimizer)
    given = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({given})" if given else "")


def _all_on_fused_devices(groups: Sequence[dict[str, object]]) -> bool:
    parameters = [p for group in groups for p in cast("Sequence[torch.Tensor]", group["params"])]
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    # It recommends kernels of its own for inference when it is imported; nothing here uses them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit  # noqa: PLC0415 - takes seconds, and few runs need it
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"AdamW8bit needs the package bitsandbytes, which cannot be loaded: {error}",
            "--optimizer_type",
            "Run python run.py setup, or use AdamW.",
            field="optimizer_type",
        ) from error
    return cast("Callable[..., torch.optim.Optimizer]", AdamW8bit)


def num_warmup_steps(lr_warmup_steps: float, num_steps: int) -> int:
    """Steps of warm-up: a number below 1 is a part of the whole run."""
    return int(lr_warmup_steps * num_steps) if lr_warmup_steps < 1 else int(lr_warmup_steps)


def rate_factor(schedule: str, step: int, *, warmup: int, num_steps: int) -> float:
    """The part of the full learning rate that optimizer step `step` (0-based) is made with, in [0, 1].

    The formulas are those of transformers' `optimization.py`, which the reference uses: a linear rise over `warmup`
    steps that begins at 0, then nothing more (constant...), a straight line to 0 at the end (linear), or half a cosine
    to 0 (cosine).
    """
    if schedule == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if schedule == "constant_with_warmup":
        return 1.0
    progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"{schedule} is not a schedule")


class LearningRateSchedule:
    """Sets the learning rate of every group before each optimizer step; groups keep the ratio of their rates.

    Steps are optimizer steps of the run, also on several devices. (The reference shortens an integer warm-up by the
    number of processes.) The state is one number.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: str, *, num_steps: int, lr_warmup_steps: float = 0
    ) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._num_steps = num_steps
        self._warmup = num_warmup_steps(lr_warmup_steps, num_steps)
        if schedule == "constant" and self._warmup:
            raise UserError(
                f"lr_warmup_steps is {lr_warmup_steps:g}, but the constant schedule has no warm-up",
                "--lr_warmup_steps",
                "Use --lr_scheduler=constant_with_warmup.",
                field="lr_scheduler",
                exit_code=2,
            )
        self._full_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._step = 0
        self._apply()

    def step(self) -> None:
        """An optimizer step is done; sets the rates of the next one."""
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._step = state["step"]
        self._apply()

    def _apply(self) -> None:
        factor = rate_factor(self._schedule, self._step, warmup=self._warmup, num_steps=self._num_steps)
        for group, rate in zip(self._optimizer.param_groups, self._full_rates, strict=True):
            group["lr"] = rate * factor
