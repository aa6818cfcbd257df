"""The optimizer: found by its name, made from the libraries that own it, and asked for the weights to use."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Final, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from trainer.schema.base import UserError, nearest
from trainer.schema.optimizers import OPTIMIZERS, finds_rate, sets_own_rate
from trainer.schema.optional_packages import is_installed, not_installed

_IMPLEMENTATION_ARGUMENTS: Final = ("foreach", "fused")
_FUSED_DEVICES: Final = ("cpu", "cuda")
_OWN_PARAMETERS: Final = ("self", "params", "lr")

MakeOptimizer = Callable[..., torch.optim.Optimizer]


@runtime_checkable
class TwoFaced(Protocol):
    """A schedule-free optimizer: it trains weights at one point and offers their average for use."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def create_optimizer(
    optimizer_type: str,
    groups: Sequence[dict[str, object]],
    *,
    learning_rate: float,
    arguments: Mapping[str, object],
) -> torch.optim.Optimizer:
    """An optimizer over `groups` of parameters, which may bring an `lr` of their own; schedule-free ones in train mode.

    `optimizer_type` is a name that `optimizer_name` gives: known, a class of `torch.optim`, or a dotted path.
    `arguments` are what `parse_optimizer_args` made of `optimizer_args`. Raises `UserError` (exit code 2) for a package
    or class that is not there, and for values that the optimizer refuses.

    Those of bitsandbytes keep the state of tensors of 4096 numbers and more in 8 bit and of smaller ones in 32 bit.
    Adafactor with `relative_step` sets its own rate: the rates of `groups` are dropped.
    """
    kind = OPTIMIZERS.get(optimizer_type)
    make = optimizer_class(optimizer_type)
    given = {**(kind.fixed if kind is not None else {}), **arguments}
    rate: float | None = learning_rate
    if sets_own_rate(optimizer_type, arguments):
        given["relative_step"] = True
        groups, rate = [{key: value for key, value in group.items() if key != "lr"} for group in groups], None
    elif finds_rate(optimizer_type):
        _demand_one_rate(optimizer_type, groups, learning_rate)
    if (
        optimizer_type == "AdamW"
        and not any(name in given for name in _IMPLEMENTATION_ARGUMENTS)
        and _all_on_fused_devices(groups)
    ):
        # One kernel for all tensors of a LoRA's hundreds: a third of the loop's time on a CPU, a launch on a GPU.
        given["fused"] = True
    if kind is None:
        _check_names(optimizer_type, make, given)
    try:
        # Said once by the checks; the package says it for each tensor.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer = make(list(groups), lr=rate, **given)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, AssertionError, ImportError) as error:
        # The arguments are the only thing that a user gives: what an optimizer refuses is one of them.
        raise UserError(
            f"{optimizer_type} refuses its settings: {error}", "--optimizer_args", field="optimizer_args", exit_code=2
        ) from error
    if isinstance(optimizer, TwoFaced):
        optimizer.train()
    return optimizer


def optimizer_class(optimizer_type: str) -> MakeOptimizer:
    """The class behind a name. Its package is imported now. Raises `UserError` (exit code 2) when it is not there."""
    kind = OPTIMIZERS.get(optimizer_type)
    if kind is not None:
        module, _, name = f"{kind.module}.{kind.class_name}".rpartition(".")
    elif "." in optimizer_type:
        module, _, name = optimizer_type.rpartition(".")
    else:
        module, name = "torch.optim", optimizer_type
    if not is_installed(module):
        raise not_installed(f"optimizer_type {optimizer_type}", module, "optimizer_type")
    if module.startswith("bitsandbytes"):
        # It recommends kernels of its own for inference when it is imported; nothing here uses them.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        found = cast("object", getattr(importlib.import_module(module), name))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"optimizer_type {optimizer_type} cannot be loaded: {error}",
            "--optimizer_type",
            "Check the spelling and the package's installation, or use AdamW.",
            field="optimizer_type",
            exit_code=2,
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(
            f"optimizer_type {optimizer_type} is not an optimizer of torch's kind",
            "--optimizer_type",
            field="optimizer_type",
            exit_code=2,
        )
    return cast("MakeOptimizer", found)


def check_optimizer(optimizer_type: str, arguments: Mapping[str, object]) -> None:
    """Raises `UserError` when `create_optimizer` would, before there is anything to train."""
    trial = nn.Parameter(torch.zeros(2, 2))
    create_optimizer(optimizer_type, [{"params": [trial]}], learning_rate=1.0, arguments=arguments)


@contextlib.contextmanager
def final_weights(optimizer: torch.optim.Optimizer) -> Generator[None, None, None]:
    """The trained weights as they are to be used: for saving, samples and validation.

    Only schedule-free optimizers train others than those. What is trained comes back to the last bit, so that a run
    does not depend on how often it was looked at.
    """
    if not isinstance(optimizer, TwoFaced):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in cast("list[nn.Parameter]", group["params"])]
    trained: list[Tensor] = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)


def group_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group at the last step: Adafactor's own, a schedule-free one's after its warm-up."""
    rates: list[float] = []
    for group in optimizer.param_groups:
        if group.get("relative_step"):
            state = optimizer.state.get(group["params"][0], {})
            # Before the first step there is no rate yet.
            own = cast("Callable[[object, object], float]", optimizer._get_lr)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            rates.append(float(own(group, state)) if "RMS" in state else 0.0)
        else:
            rates.append(float(group.get("scheduled_lr", group["lr"])))
    return rates


def found_rates(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """For each group the rate that the optimizer found times its factor (`d*lr`), or None for those that find none."""
    if not all("d" in group for group in optimizer.param_groups):
        return None
    return [float(group["d"]) * float(group["lr"]) for group in optimizer.param_groups]


def optimizer_description(optimizer: torch.optim.Optimizer, arguments: Mapping[str, object]) -> str:
    """The optimizer as the metadata name it: class with module, then the user's arguments, if any."""
    kind = type(optimizer)
    given = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({given})" if given else "")


def _all_on_fused_devices(groups: Sequence[dict[str, object]]) -> bool:
    parameters = [p for group in groups for p in cast("Sequence[torch.Tensor]", group["params"])]
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _demand_one_rate(optimizer_type: str, groups: Sequence[dict[str, object]], learning_rate: float) -> None:
    rates = dict.fromkeys(cast("float", group.get("lr", learning_rate)) for group in groups)
    if len(rates) > 1:
        raise UserError(
            f"{optimizer_type} finds one rate for all, but there are several: {', '.join(f'{r:g}' for r in rates)}",
            "--learning_rate",
            "Give learning_rate alone, usually 1, and no LoRA+ ratio.",
            field="learning_rate",
            exit_code=2,
        )


def _check_names(optimizer_type: str, make: MakeOptimizer, arguments: Mapping[str, object]) -> None:
    """What a class that is not known by name takes is read from its signature."""
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name not in _OWN_PARAMETERS]
    for name in arguments:
        if name not in known:
            near = nearest(name, known)
            raise UserError(
                f"{optimizer_type} has no setting {name}",
                "--optimizer_args",
                f"Did you mean {near}?" if near else f"It takes {', '.join(known)}.",
                field="optimizer_args",
                exit_code=2,
            )
