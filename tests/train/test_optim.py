"""The optimizers on real tensors: AdamW's numbers, what is asked of the others, and each of them on a real LoRA."""

from __future__ import annotations

import copy
import inspect
import math
import shlex
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from trainer.lora.network import LoraNetwork
from trainer.model.flux import Flux
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.optimizers import OPTIMIZERS, TORCH_OPTIMIZERS
from trainer.train.optim import (
    check_optimizer,
    create_optimizer,
    final_weights,
    found_rates,
    group_rates,
    optimizer_class,
    optimizer_description,
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


_NOT_OFFERED = {"params", "lr", "args", "optim_bits", "capturable", "differentiable", "fsdp_in_use"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_settings_of_the_options_are_those_of_the_class(name: str) -> None:
    kind = OPTIMIZERS[name]
    takes = set(inspect.signature(optimizer_class(name)).parameters) - _NOT_OFFERED
    if kind.module == "bitsandbytes.optim":
        takes -= {"amsgrad"}
        assert set(kind.settings) - {"amsgrad"} == takes
    else:
        assert set(kind.settings) == takes


def test_the_classes_of_torch_are_all_named_but_those_that_cannot_train_a_lora() -> None:
    found = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    # One needs a closure, one sparse gradients; Adafactor means that of transformers.
    assert found - {"Optimizer", "LBFGS", "SparseAdam", "Adafactor"} == set(TORCH_OPTIMIZERS) | {"AdamW"}


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


# ------------------------------------------------------------------------------------------------ all of them, on a LoRA


class Task:
    """A tiny transformer's Linears with a LoRA each, and a loss that falls when they learn another Linear."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        params = FluxParams(
            in_channels=64,
            out_channels=64,
            vec_in_dim=8,
            context_in_dim=8,
            hidden_size=32,
            mlp_ratio=4.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=(4, 6, 6),
            theta=10_000,
            qkv_bias=True,
            guidance_embed=False,
        )
        self.flux = Flux(params)
        names = [
            name
            for name, module in self.flux.named_modules()
            if isinstance(module, nn.Linear) and module.in_features == 32 and "double_blocks.0.img" in name
        ]
        self.network = LoraNetwork.attach(self.flux, None, LoraSpec(rank=4, alpha=4), torch.Generator().manual_seed(2))
        self.x = torch.randn(32, 32)
        self.linears = [self.flux.get_submodule(name) for name in names]
        with torch.no_grad():
            outputs = [linear(self.x) for linear in self.linears]
            self.targets = [output + 0.5 * torch.randn(output.shape) for output in outputs]

    def loss(self) -> Tensor:
        pairs = zip(self.linears, self.targets, strict=True)
        return torch.stack([(linear(self.x) - target).square().mean() for linear, target in pairs]).sum()

    def optimizer(self, name: str, **arguments: object) -> torch.optim.Optimizer:
        rate = 1.0 if OPTIMIZERS[name].finds_rate else 0.3 if "SGD" in name else 1e-2
        return create_optimizer(
            name, self.network.parameter_groups(rate, rate), learning_rate=rate, arguments=arguments
        )

    def train(self, optimizer: torch.optim.Optimizer, num_steps: int) -> float:
        for _ in range(num_steps):
            optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            optimizer.step()
        with final_weights(optimizer), torch.no_grad():
            return self.loss().item()


# They begin with a rate that is far too small and find a better one: too slow, or too wild, for so short a run.
_ARGUMENTS: dict[str, dict[str, object]] = {
    **{
        name: {"growth_rate": 1.02, "d0": 1e-3}
        for name in ("DAdaptAdam", "DAdaptAdamPreprint", "DAdaptation", "DAdaptAdan", "DAdaptAdanIP", "DAdaptSGD")
    },
    "DAdaptAdaGrad": {"growth_rate": 1.02, "d0": 1e-2},
    "Prodigy": {"growth_rate": 1.2},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_a_lora_and_its_state_comes_back(name: str) -> None:
    task = Task()
    before = task.loss().item()
    optimizer = task.optimizer(name, **_ARGUMENTS.get(name, {}))
    after = task.train(optimizer, 40)
    assert math.isfinite(after)
    assert after < 0.9999 * before

    other = Task()
    other.network.load_state_dict(task.network.state_dict())
    restored = other.optimizer(name, **_ARGUMENTS.get(name, {}))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert task.train(optimizer, 3) == other.train(restored, 3)


@pytest.mark.parametrize(
    "name", ["NAdam", "prodigyplus.ProdigyPlusScheduleFree", "bitsandbytes.optim.AdEMAMix8bit", "torch.optim.Adam"]
)
def test_any_other_class_is_found_by_its_name_or_path(name: str) -> None:
    (weight,) = parameters((64, 64))
    before = weight.detach().clone()
    optimizer = create_optimizer(name, [{"params": [weight]}], learning_rate=1e-3, arguments={"weight_decay": 0.0})
    assert type(optimizer).__name__ == name.rpartition(".")[2]
    train(optimizer, 3)
    assert not torch.equal(weight, before)


def test_the_fixed_settings_of_nesterov_are_the_references() -> None:
    group = make("SGDNesterov", parameters((4, 8))).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert make("SGDNesterov8bit", parameters((4, 8))).param_groups[0]["betas"][0] == 0.9
    assert make("SGDNesterov8bit", parameters((4, 8)), momentum=0.5).param_groups[0]["betas"][0] == 0.5


def test_adafactor_sets_its_own_rate_and_drops_those_of_the_groups() -> None:
    first, second = parameters((4, 8), (4, 8))
    optimizer = create_optimizer(
        "Adafactor", [{"params": [first], "lr": 1e-5}, {"params": [second]}], learning_rate=1e-3, arguments={}
    )
    assert [(group["lr"], group["relative_step"]) for group in optimizer.param_groups] == [(None, True)] * 2
    assert group_rates(optimizer) == [0.0, 0.0]
    train(optimizer, 1)
    # Its first step: 1 / sqrt(1), at most 0.01, times the weights' root mean square.
    expected = [0.01 * float(optimizer.state[weight]["RMS"]) for weight in (first, second)]
    assert group_rates(optimizer) == pytest.approx(expected)
    fixed = create_optimizer(
        "Adafactor", [{"params": [first], "lr": 1e-5}], learning_rate=1e-3, arguments={"relative_step": False}
    )
    assert fixed.param_groups[0]["lr"] == 1e-5
    warmed = make("Adafactor", [first], relative_step=False, warmup_init=True)
    assert warmed.param_groups[0]["relative_step"] is True


def test_schedule_free_training_is_not_changed_by_looking_at_its_weights() -> None:
    looked_at, left_alone = Task(), Task()
    one, other = (task.optimizer("AdamWScheduleFree", warmup_steps=4) for task in (looked_at, left_alone))
    for _ in range(5):
        looked_at.train(one, 1)
    trained = [p.detach().clone() for p in looked_at.network.parameters()]
    with final_weights(one):
        assert one.param_groups[0]["train_mode"] is False
        assert any(not torch.equal(p, t) for p, t in zip(looked_at.network.parameters(), trained, strict=True))
    assert one.param_groups[0]["train_mode"] is True
    for _ in range(5):
        other.zero_grad(set_to_none=True)
        left_alone.loss().backward()
        other.step()
    for ours, theirs in zip(looked_at.network.parameters(), left_alone.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert group_rates(one) == pytest.approx([1e-2])
    assert found_rates(one) is None


def test_a_found_rate_is_shown_with_its_factor() -> None:
    optimizer = create_optimizer("Prodigy", [{"params": parameters((8, 8))}], learning_rate=0.5, arguments={})
    assert found_rates(optimizer) == [0.5 * 1e-6]


def test_optimizers_that_find_one_rate_refuse_several() -> None:
    first, second = parameters((4, 8), (4, 8))
    groups: list[dict[str, object]] = [{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}]
    with pytest.raises(UserError, match=r"Prodigy finds one rate for all, but there are several: 1, 0\.5"):
        create_optimizer("Prodigy", groups, learning_rate=1.0, arguments={})


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("no_such_package.Lion", "needs the package no_such_package, which is not installed"),
        ("torch.optim.Lyon", "cannot be loaded"),
        ("torch.nn.Linear", "not an optimizer of torch's kind"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_trained(name: str, pieces: str) -> None:
    with pytest.raises(UserError, match=pieces) as caught:
        check_optimizer(name, {})
    assert (caught.value.exit_code, caught.value.problems[0].field) == (2, "optimizer_type")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("Lion", "lion_pytorch", "lion-pytorch"),
        ("Prodigy", "prodigyopt", "prodigyopt"),
        ("AdamW8bit", "bitsandbytes", "bitsandbytes"),
    ],
)
def test_a_missing_package_comes_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    # As in an environment without it: the import system says that there is none.
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        check_optimizer(name, {})
    assert f"needs the package {package}, which is not installed" in str(caught.value)
    assert f"Run: {shlex.quote(sys.executable)} -m pip install {package}" in str(caught.value)


def test_the_settings_of_other_classes_are_held_against_their_signature() -> None:
    with pytest.raises(UserError, match="NAdam has no setting momentum") as caught:
        check_optimizer("NAdam", {"momentum": 0.9})
    assert caught.value.problems[0].hint == "Did you mean momentum_decay?"
    with pytest.raises(UserError, match="NAdam refuses its settings"):
        check_optimizer("NAdam", {"betas": (2.0, 0.9)})
