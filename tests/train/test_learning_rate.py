"""The learning-rate schedules: every named one against its formula, classes of torch, what is refused, and the state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainer.schema.base import UserError
from trainer.schema.option_reading import Given, read_options
from trainer.schema.options import Options
from trainer.schema.schedules import SCHEDULES
from trainer.train.learning_rate import LearningRateSchedule, check_schedule, learning_rate_schedule

N = 40
"""Steps of the run."""


def options_of(**values: object) -> Options:
    options = read_options({name: Given(value, name) for name, value in values.items()}).options
    assert options is not None
    return options


def sgd(rate: float = 1.0, *more: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": each} for each in (rate, *more)]
    return torch.optim.SGD(groups, lr=rate)


def rates(num_steps: int = N, *, rate: float = 1.0, **values: object) -> list[float]:
    optimizer = sgd(rate)
    schedule = learning_rate_schedule(options_of(learning_rate=rate, **values), optimizer, num_steps=num_steps)
    found: list[float] = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def _cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def _rise(warmup: int, after: Callable[[float], float]) -> Callable[[int], float]:
    """A linear rise from 0 over `warmup` steps, then `after` of the part of the rest that is done."""
    return lambda n: n / warmup if n < warmup else after((n - warmup) / (N - warmup))


CLOSED_FORMS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda _n: 1.0),
    "constant_with_warmup": ({"lr_warmup_steps": 5}, _rise(5, lambda _x: 1.0)),
    "linear": ({"lr_warmup_steps": 0.25}, _rise(10, lambda x: 1 - x)),
    "cosine": ({"lr_warmup_steps": 8}, _rise(8, _cosine)),
    "cosine_with_restarts": (
        {"lr_warmup_steps": 8, "lr_scheduler_num_cycles": 3},
        _rise(8, lambda x: _cosine(3 * x % 1.0)),
    ),
    "polynomial": (
        {"lr_warmup_steps": 8, "lr_scheduler_power": 2, "lr_scheduler_args": ["lr_end=0.01"]},
        _rise(8, lambda x: 0.99 * (1 - x) ** 2 + 0.01),
    ),
    "inverse_sqrt": (
        {"lr_warmup_steps": 5, "lr_scheduler_timescale": 20},
        lambda n: n / 5 if n < 5 else 1 / math.sqrt((n + 15) / 20),
    ),
    "cosine_with_min_lr": (
        {"lr_warmup_steps": 8, "lr_scheduler_min_lr_ratio": 0.2},
        _rise(8, lambda x: 0.2 + 0.8 * _cosine(x)),
    ),
    "cosine_warmup_with_min_lr": (
        {"lr_warmup_steps": 8, "lr_scheduler_args": ["min_lr=0.2", "warmup_lr_rate=0.1"]},
        lambda n: 0.1 + 0.9 * n / 7 if n < 8 else 0.2 + 0.8 * _cosine((n - 8 + 1) / (N - 8)),
    ),
    "warmup_stable_decay": (
        {"lr_warmup_steps": 5, "lr_decay_steps": 0.5, "lr_scheduler_min_lr_ratio": 0.1},
        # The rise begins at the lowest rate, too.
        lambda n: 0.1 + 0.9 * n / 5 if n < 5 else 1.0 if n < 20 else 0.1 + 0.9 * _cosine((n - 20) / 20),
    ),
    "piecewise_constant": (
        {"lr_scheduler_args": ["step_rules=1:10,0.1:20,0.01"]},
        lambda n: 1.0 if n < 10 else 0.1 if n < 20 else 0.01,
    ),
}


def test_every_schedule_of_the_options_is_held_against_a_formula_or_has_its_own_test() -> None:
    assert set(CLOSED_FORMS) | {"reduce_lr_on_plateau", "adafactor"} == set(SCHEDULES)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_rates_are_those_of_the_formula(name: str) -> None:
    settings, formula = CLOSED_FORMS[name]
    assert rates(lr_scheduler=name, **settings) == pytest.approx([formula(n) for n in range(N)], abs=1e-9)


def test_without_a_time_scale_inverse_sqrt_takes_its_warm_up() -> None:
    found = rates(lr_scheduler="inverse_sqrt", lr_warmup_steps=10)
    assert found[39] == pytest.approx(1 / math.sqrt(39 / 10))


def test_a_warm_up_longer_than_the_run_never_reaches_the_full_rate() -> None:
    found = rates(10, rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=50)
    assert found[0] == 0.0
    assert found[-1] == pytest.approx(1e-3 * 9 / 50)


def test_groups_keep_the_ratio_of_their_rates() -> None:
    optimizer = sgd(1e-3, 1e-5)
    schedule = LearningRateSchedule(optimizer, "linear", num_steps=10)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.9e-3, 0.9e-5])


def test_a_lowest_rate_is_a_part_of_each_groups_own() -> None:
    optimizer = sgd(1e-3, 1e-5)
    schedule = LearningRateSchedule(
        optimizer, "cosine_with_min_lr", num_steps=4, num_cycles=1, arguments={"min_lr": 1e-4}
    )
    for _ in range(4):
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-6])


def test_the_plateau_lowers_the_rate_when_the_loss_stops_falling() -> None:
    optimizer = sgd()
    schedule = learning_rate_schedule(
        options_of(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=["patience=1", "factor=0.5"]),
        optimizer,
        num_steps=N,
    )
    assert schedule.waits_for_loss
    found: list[float] = []
    for loss in (1.0, 0.5, 0.5, 0.5, 0.4):
        schedule.step()
        schedule.observe(loss)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == [1.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("name", ["StepLR", "torch.optim.lr_scheduler.StepLR"])
def test_a_class_of_torch_is_found_by_its_name_or_path(name: str) -> None:
    found = rates(5, lr_scheduler_type=name, lr_scheduler_args=["step_size=2", "gamma=0.1"])
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_adafactors_own_rate_and_schedule_free_optimizers_have_no_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.5)
    for values in (
        {"optimizer_type": "Adafactor"},
        {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine", "lr_warmup_steps": 5},
    ):
        schedule = learning_rate_schedule(options_of(learning_rate=0.5, **values), optimizer, num_steps=10)
        for _ in range(9):
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("values", "pieces"),
    [
        ({"lr_scheduler_type": "StepLRR"}, "Did you mean StepLR?"),
        ({"lr_scheduler_type": "StepLR"}, "refuses its settings"),
        ({"lr_scheduler_type": "no_such_package.X"}, "pip install no_such_package"),
        ({"lr_scheduler_type": "torch.nn.Linear"}, "not a schedule of torch's kind"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 30, "lr_decay_steps": 20},
            r"warm-up \(30\) and decay \(20\) are longer than the run \(40 steps\)",
        ),
        (
            {"lr_scheduler": "polynomial", "learning_rate": 1e-4, "lr_scheduler_args": ["lr_end=0.1"]},
            "refuses its settings",
        ),
    ],
)
def test_what_cannot_be_a_schedule_is_said_before_anything_is_trained(values: dict[str, object], pieces: str) -> None:
    with pytest.raises(UserError) as caught:
        check_schedule(options_of(**values), num_steps=N)
    assert caught.value.exit_code == 2
    assert caught.match(pieces)


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": ["patience=0"]},
        {"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": ["gamma=0.9"]},
        {"lr_scheduler_type": "CosineAnnealingWarmRestarts", "lr_scheduler_args": ["T_0=3"]},
        {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=2.0", "total_steps=20"]},
    ],
)
def test_a_restored_schedule_goes_on_where_it_was(values: dict[str, object]) -> None:
    def start() -> tuple[torch.optim.Optimizer, LearningRateSchedule]:
        optimizer = sgd()
        return optimizer, learning_rate_schedule(options_of(**values), optimizer, num_steps=10)

    def go_on(optimizer: torch.optim.Optimizer, schedule: LearningRateSchedule, steps: range) -> list[float]:
        found: list[float] = []
        for step in steps:
            optimizer.step()
            schedule.step()
            schedule.observe(float(step))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    whole = go_on(*start(), range(9))
    first, schedule = start()
    go_on(first, schedule, range(4))
    kept: dict[str, Any] = json.loads(json.dumps(schedule.state_dict()))
    second, restored = start()
    second.load_state_dict(first.state_dict())
    restored.load_state_dict(kept)
    assert go_on(second, restored, range(4, 9)) == whole[4:]


def test_the_constant_schedule_refuses_a_warm_up() -> None:
    with pytest.raises(UserError, match="constant_with_warmup") as caught:
        LearningRateSchedule(sgd(), "constant", num_steps=10, lr_warmup_steps=0.5)
    assert caught.value.exit_code == 2
