"""The optimizers on real tensors, and the schedule against transformers' own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import nn
from transformers.optimization import get_scheduler

from trainer.schema.base import UserError
from trainer.schema.optimizer_args import OPTIMIZER_SETTINGS
from trainer.train.optim import (
    LearningRateSchedule,
    create_optimizer,
    num_warmup_steps,
    optimizer_description,
    rate_factor,
)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """Steps on recorded gradients, the same for every optimizer."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(num_steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def make(kind: str, params: list[nn.Parameter], **arguments: object) -> torch.optim.Optimizer:
    return create_optimizer(kind, [{"params": params}], learning_rate=1e-3, arguments=arguments)


def test_adamw_is_torchs_with_its_defaults_in_one_kernel() -> None:
    ours, plain = parameters((4, 64), (64, 4)), parameters((4, 64), (64, 4))
    optimizer = make("AdamW", ours)
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    train(optimizer, 5)
    train(torch.optim.AdamW(plain, lr=1e-3, foreach=False), 5)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-7, rtol=0)


def test_groups_keep_their_rates_and_names() -> None:
    first, second = parameters((4, 8), (4, 8))
    optimizer = create_optimizer(
        "AdamW",
        [{"params": [first], "lr": 1e-5, "name": "textencoder 1 "}, {"params": [second], "name": "unet"}],
        learning_rate=1e-3,
        arguments={},
    )
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("textencoder 1 ", 1e-5),
        ("unet", 1e-3),
    ]


def test_adamw8bit_trains_large_and_small_tensors_on_a_cpu() -> None:
    ours, plain = parameters((64, 64), (16, 3072), (4, 8), (1,)), parameters((64, 64), (16, 3072), (4, 8), (1,))
    optimizer = make("AdamW8bit", ours)
    train(optimizer, 10)
    train(torch.optim.AdamW(plain, lr=1e-3, foreach=False), 10)
    for one, other in zip(ours, plain, strict=True):
        # Ten steps of 1e-3: a tenth of the way at most is lost to eight bits.
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    state = {key.shape: value["state1"].dtype for key, value in optimizer.state.items()}
    assert state == {(64, 64): torch.uint8, (16, 3072): torch.uint8, (4, 8): torch.float32, (1,): torch.float32}


def test_adamw8bit_works_under_a_gradient_scaler_on_a_cpu() -> None:
    (weight,) = parameters((64, 64))
    before = weight.detach().clone()
    optimizer = make("AdamW8bit", [weight])
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(weight.square().mean()).backward()
    scaler.unscale_(optimizer)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * before / before.numel())
    scaler.step(optimizer)
    scaler.update()
    assert (weight - before).abs().max().item() == pytest.approx(1e-3, rel=0.1)


def test_fused_adamw_skips_a_step_with_infinite_gradients_under_a_scaler() -> None:
    (weight,) = parameters((4, 8))
    before = weight.detach().clone()
    optimizer = make("AdamW", [weight])
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    for factor in (float("inf"), 1.0):
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if factor != 1.0:
            assert torch.equal(weight, before)
    assert torch.allclose(weight, before * (1 - 1e-5) - 1e-3, atol=1e-6)


def test_importing_the_module_does_not_import_bitsandbytes() -> None:
    code = "import sys, trainer.train.optim; assert 'bitsandbytes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_given_arguments_reach_the_optimizer() -> None:
    optimizer = make("AdamW", parameters((4, 8)), betas=(0.8, 0.9), weight_decay=0.0, foreach=True)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["foreach"], group["fused"]) == ((0.8, 0.9), 0.0, True, None)


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_every_setting_of_the_options_is_taken_by_its_optimizer(kind: str) -> None:
    values = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "min_8bit_size": 8, "fused": None, "foreach": None}
    for name in OPTIMIZER_SETTINGS[kind]:
        make(kind, parameters((4, 8)), **{name: values.get(name, False)})


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_arguments_that_the_optimizer_refuses_are_reported_as_options(kind: str) -> None:
    with pytest.raises(UserError, match=f"{kind} refuses its settings") as caught:
        make(kind, parameters((4, 8)), betas=(2.0, 0.9))
    assert caught.value.exit_code == 2
    assert caught.value.problems[0].field == "optimizer_args"


def test_the_description_names_class_and_given_arguments() -> None:
    assert optimizer_description(make("AdamW", parameters((4, 8))), {}) == "torch.optim.adamw.AdamW"
    eight = make("AdamW8bit", parameters((4, 8)), weight_decay=0.1, betas=(0.9, 0.99))
    described = optimizer_description(eight, {"weight_decay": 0.1, "betas": (0.9, 0.99)})
    assert described == "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))"


def test_warm_up_below_one_is_a_part_of_the_run() -> None:
    assert num_warmup_steps(0.1, 200) == 20
    assert num_warmup_steps(0, 200) == 0
    assert num_warmup_steps(30, 200) == 30


def rates(schedule: str, warmup: float, num_steps: int) -> list[float]:
    optimizer = make("AdamW", parameters((4, 8)))
    ours = LearningRateSchedule(optimizer, schedule, num_steps=num_steps, lr_warmup_steps=warmup)
    found: list[float] = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        ours.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [("constant", 0), ("constant_with_warmup", 5), ("linear", 0), ("linear", 5), ("cosine", 0), ("cosine", 0.25)],
)
def test_rates_are_those_of_transformers(schedule: str, warmup: float) -> None:
    num_steps = 20
    optimizer = torch.optim.AdamW(parameters((4, 8)), lr=1e-3)
    reference = get_scheduler(schedule, optimizer, num_warmup_steps(warmup, num_steps), num_steps)
    recorded: list[float] = []
    for _ in range(num_steps):
        recorded.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cast("Callable[[], None]", reference.step)()
    assert rates(schedule, warmup, num_steps) == pytest.approx(recorded, rel=1e-12, abs=1e-18)


def test_a_warm_up_longer_than_the_run_never_reaches_the_full_rate() -> None:
    found = rates("cosine", 50, 10)
    assert found[0] == 0.0
    assert found[-1] == pytest.approx(1e-3 * 9 / 50)
    assert rate_factor("linear", 25, warmup=0, num_steps=20) == 0.0


def test_groups_keep_the_ratio_of_their_rates() -> None:
    first, second = parameters((4, 8), (4, 8))
    optimizer = create_optimizer(
        "AdamW", [{"params": [first], "lr": 1e-5}, {"params": [second]}], learning_rate=1e-3, arguments={}
    )
    schedule = LearningRateSchedule(optimizer, "linear", num_steps=10)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.9e-5, 0.9e-3])


def test_a_restored_schedule_goes_on_where_it_was() -> None:
    optimizer = make("AdamW", parameters((4, 8)))
    schedule = LearningRateSchedule(optimizer, "cosine", num_steps=10, lr_warmup_steps=2)
    for _ in range(4):
        schedule.step()
    expected = optimizer.param_groups[0]["lr"]
    other = make("AdamW", parameters((4, 8)))
    restored = LearningRateSchedule(other, "cosine", num_steps=10, lr_warmup_steps=2)
    assert schedule.state_dict() == {"step": 4}
    restored.load_state_dict(schedule.state_dict())
    assert other.param_groups[0]["lr"] == expected


def test_the_constant_schedule_refuses_a_warm_up_and_unknown_schedules_fail() -> None:
    optimizer = make("AdamW", parameters((4, 8)))
    with pytest.raises(UserError, match="constant_with_warmup") as caught:
        LearningRateSchedule(optimizer, "constant", num_steps=10, lr_warmup_steps=0.5)
    assert caught.value.exit_code == 2
    with pytest.raises(ValueError, match="cubic is not a schedule"):
        LearningRateSchedule(optimizer, "cubic", num_steps=10)
