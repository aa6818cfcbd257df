"""The learning-rate schedule: the rate of every group before each step.

Schedules with a name are functions of the step, taken from transformers, so that what has to be kept of one is a number.
A schedule that is given as a class, and the one that waits for the loss to stop falling, are torch's own and keep theirs.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.schema.base import UserError, nearest
from trainer.schema.optimizer_rules import schedule_arguments
from trainer.schema.optimizers import is_schedule_free
from trainer.schema.optional_packages import is_installed, not_installed
from trainer.schema.options import Options
from trainer.schema.schedules import WITHOUT_WARMUP, num_steps_of, parse_step_rules

PLATEAU: Final = "reduce_lr_on_plateau"
_TORCH_MODULE: Final = "torch.optim.lr_scheduler"


class LearningRateSchedule:
    """Sets the learning rate of every group before each optimizer step; groups keep the ratio of their rates.

    Steps are optimizer steps of the run, also on several devices. (The reference shortens an integer warm-up by the
    number of processes.) `scheduler_class` is the name of another class of `torch.optim.lr_scheduler`, or a dotted path,
    and wins over `schedule`; `arguments` go to either. Raises `UserError` (exit code 2) for what cannot be a schedule.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: str,
        *,
        num_steps: int,
        lr_warmup_steps: float = 0,
        lr_decay_steps: float = 0,
        num_cycles: int = 1,
        power: float = 1.0,
        timescale: int | None = None,
        min_lr_ratio: float | None = None,
        arguments: Mapping[str, object] | None = None,
        scheduler_class: str = "",
    ) -> None:
        self._optimizer = optimizer
        self._step = 0
        self._scheduler: LRScheduler | None = None
        self._factor: Callable[[int], float] | None = None
        given = dict(arguments or {})
        warmup = num_steps_of(lr_warmup_steps, num_steps)
        if scheduler_class:
            self._scheduler = _scheduler_of_class(scheduler_class, optimizer, given)
        elif schedule in WITHOUT_WARMUP and warmup:
            raise UserError(
                f"lr_warmup_steps is {lr_warmup_steps:g}, but the schedule {schedule} has no warm-up",
                "--lr_warmup_steps",
                "Use --lr_scheduler=constant_with_warmup.",
                field="lr_scheduler",
                exit_code=2,
            )
        elif schedule == PLATEAU:
            self._scheduler = _made(partial(ReduceLROnPlateau, optimizer, **cast("dict[str, Any]", given)), PLATEAU)
        elif schedule != "adafactor":
            self._factor = _made(
                lambda: rate_factors(
                    schedule,
                    learning_rate=float(optimizer.defaults.get("lr") or 1.0),
                    num_steps=num_steps,
                    warmup=warmup,
                    decay=num_steps_of(lr_decay_steps, num_steps),
                    num_cycles=num_cycles,
                    power=power,
                    timescale=timescale,
                    min_lr_ratio=min_lr_ratio,
                    arguments=given,
                ),
                schedule,
            )
        self._full_rates = [group["lr"] for group in optimizer.param_groups]
        self._apply()

    @property
    def waits_for_loss(self) -> bool:
        """Whether the rate follows `observe` instead of the steps."""
        return isinstance(self._scheduler, ReduceLROnPlateau)

    def step(self) -> None:
        """An optimizer step is done; sets the rates of the next one."""
        self._step += 1
        if self._scheduler is not None and not self.waits_for_loss:
            with warnings.catch_warnings():
                # A step that fp16 leaves out looks to torch as if the optimizer had been forgotten.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._scheduler.step()
        self._apply()

    def observe(self, loss: float) -> None:
        """The validation loss or, without validation, the mean loss of an epoch; only `waits_for_loss` uses it."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(loss)

    def state_dict(self) -> dict[str, object]:
        """Numbers, texts and lists only: it can be written as JSON."""
        state: dict[str, object] = {"step": self._step}
        if self._scheduler is not None:
            state["scheduler"] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the optimizer's state is to be loaded before."""
        self._step = int(state["step"])
        if self._scheduler is not None and "scheduler" in state:
            self._scheduler.load_state_dict(dict(state["scheduler"]))
        self._apply()

    def _apply(self) -> None:
        if self._factor is None:
            return
        factor = self._factor(self._step)
        for group, rate in zip(self._optimizer.param_groups, self._full_rates, strict=True):
            group["lr"] = rate * factor


def learning_rate_schedule(
    options: Options, optimizer: torch.optim.Optimizer, *, num_steps: int
) -> LearningRateSchedule:
    """The schedule that the options ask for; a schedule-free optimizer keeps its rate."""
    if is_schedule_free(options.optimizer_type):
        return LearningRateSchedule(optimizer, "constant", num_steps=num_steps)
    return LearningRateSchedule(
        optimizer,
        options.lr_scheduler,
        num_steps=num_steps,
        lr_warmup_steps=options.lr_warmup_steps,
        lr_decay_steps=options.lr_decay_steps,
        num_cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        timescale=options.lr_scheduler_timescale,
        min_lr_ratio=options.lr_scheduler_min_lr_ratio,
        arguments=schedule_arguments(options),
        scheduler_class=options.lr_scheduler_type,
    )


def check_schedule(options: Options, *, num_steps: int) -> None:
    """Raises `UserError` when `learning_rate_schedule` would, before there is anything to train."""
    trial = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.learning_rate or 1.0)
    learning_rate_schedule(options, trial, num_steps=num_steps)


def rate_factors(
    schedule: str,
    *,
    learning_rate: float,
    num_steps: int,
    warmup: int = 0,
    decay: int = 0,
    num_cycles: int = 1,
    power: float = 1.0,
    timescale: int | None = None,
    min_lr_ratio: float | None = None,
    arguments: Mapping[str, object] | None = None,
) -> Callable[[int], float]:
    """The part of the full rate that optimizer step n (0-based) is made with, as a function of n.

    What the options mean for each schedule is as in kohya-ss/sd-scripts (`library/train_util.py`, `get_scheduler_fix`);
    so are the half cycles of the cosines that end at a lowest rate.
    """
    given: dict[str, Any] = dict(arguments or {})
    if schedule == "constant":
        return lambda _step: 1.0
    from transformers import optimization  # noqa: PLC0415 - takes seconds, which a constant rate need not cost

    # The schedules only read the rate from their optimizer; this one is never stepped.
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=learning_rate)
    match schedule:
        case "piecewise_constant":
            return partial(_piecewise, *parse_step_rules(str(given["step_rules"])))
        case "constant_with_warmup":
            made = optimization.get_constant_schedule_with_warmup(stand_in, warmup)
        case "linear":
            made = optimization.get_linear_schedule_with_warmup(stand_in, warmup, num_steps)
        case "cosine":
            made = optimization.get_cosine_schedule_with_warmup(stand_in, warmup, num_steps, **given)
        case "cosine_with_restarts":
            made = optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
                stand_in, warmup, num_steps, num_cycles
            )
        case "polynomial":
            made = optimization.get_polynomial_decay_schedule_with_warmup(
                stand_in, warmup, num_steps, power=power, **given
            )
        case "inverse_sqrt":
            made = optimization.get_inverse_sqrt_schedule(stand_in, warmup, timescale)
        case "cosine_with_min_lr":
            made = optimization.get_cosine_with_min_lr_schedule_with_warmup(
                stand_in, warmup, num_steps, num_cycles / 2, min_lr_rate=min_lr_ratio, **given
            )
        case "cosine_warmup_with_min_lr":
            made = optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
                stand_in, warmup, num_steps, num_cycles / 2, min_lr_rate=min_lr_ratio, **given
            )
        case "warmup_stable_decay":
            if warmup + decay > num_steps:
                raise ValueError(f"warm-up ({warmup}) and decay ({decay}) are longer than the run ({num_steps} steps)")
            made = optimization.get_wsd_schedule(
                stand_in,
                warmup,
                decay,
                num_stable_steps=num_steps - warmup - decay,
                num_cycles=num_cycles / 2,
                min_lr_ratio=min_lr_ratio or 0.0,
                **given,
            )
        case _:
            raise AssertionError(f"{schedule} is not a schedule")
    (factor,) = made.lr_lambdas
    return factor


def _piecewise(rules: list[tuple[int, float]], last: float, step: int) -> float:
    return next((factor for until, factor in rules if step < until), last)


def _made(make: Callable[[], Any], name: str) -> Any:
    """What `make` gives; what it refuses are the user's settings."""
    try:
        return make()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"the schedule {name} refuses its settings: {error}",
            "--lr_scheduler_args",
            field="lr_scheduler_args",
            exit_code=2,
        ) from error


def _scheduler_of_class(name: str, optimizer: torch.optim.Optimizer, arguments: dict[str, object]) -> LRScheduler:
    module, _, class_name = (name if "." in name else f"{_TORCH_MODULE}.{name}").rpartition(".")
    if not is_installed(module):
        raise not_installed(f"lr_scheduler_type {name}", module, "lr_scheduler_type")
    try:
        found = cast("object", getattr(importlib.import_module(module), class_name))
    except (ImportError, OSError, AttributeError) as error:
        known = {key.lower(): key for key, value in vars(torch.optim.lr_scheduler).items() if inspect.isclass(value)}
        near = nearest(class_name, known)
        raise UserError(
            f"lr_scheduler_type {name} cannot be loaded: {error}",
            "--lr_scheduler_type",
            f"Did you mean {known[near]}?" if near else "Check the spelling and the package's installation.",
            field="lr_scheduler_type",
            exit_code=2,
        ) from error
    if not (isinstance(found, type) and issubclass(found, LRScheduler)):
        raise UserError(
            f"lr_scheduler_type {name} is not a schedule of torch's kind",
            "--lr_scheduler_type",
            field="lr_scheduler_type",
            exit_code=2,
        )
    return cast("LRScheduler", _made(partial(cast("Any", found), optimizer, **arguments), name))
