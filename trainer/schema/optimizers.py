"""The optimizers that are known by name: where each lives, what it takes, and how it wants to be treated.

Names and their fixed settings are those of kohya-ss/sd-scripts (`library/train_util.py`, `get_optimizer`); what each
takes is the signature of its class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol, cast

from trainer.schema.base import nearest

Check = tuple[Callable[[object], bool], str]
"""Whether a value is right, and the rest of a sentence that says what it must be."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_amount(value: object) -> bool:
    return _is_number(value) and 0 <= cast("float", value) < math.inf


def _is_part(value: object) -> bool:
    return _is_number(value) and 0 <= cast("float", value) < 1


def _is_list_of(count: int, is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        if not isinstance(value, (tuple, list)):
            return False
        values = cast("Sequence[object]", value)
        return len(values) == count and all(is_right(part) for part in values)

    return check


def _is_count(least: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and value >= least


SWITCH: Final[Check] = (lambda value: isinstance(value, bool), "must be True or False")
SWITCH_OR_NONE: Final[Check] = (lambda value: value is None or isinstance(value, bool), "must be True, False or None")
AMOUNT: Final[Check] = (_is_amount, "must be a number, 0 or more")
NUMBER: Final[Check] = (lambda value: _is_number(value) and math.isfinite(cast("float", value)), "must be a number")
ABOVE_ZERO: Final[Check] = (lambda value: _is_number(value) and cast("float", value) > 0, "must be a number above 0")
PART: Final[Check] = (_is_part, "must be a number from 0 to below 1")
PART_OR_NONE: Final[Check] = (
    lambda value: value is None or _is_part(value),
    "must be a number from 0 to below 1, or None",
)
COUNT: Final[Check] = (_is_count(1), "must be a whole number, 1 or more")
COUNT_OR_ZERO: Final[Check] = (_is_count(0), "must be a whole number, 0 or more")
BETAS: Final[Check] = (_is_list_of(2, _is_part), "must be two numbers below 1, such as (0.9,0.999)")
THREE_BETAS: Final[Check] = (_is_list_of(3, _is_part), "must be three numbers below 1, such as (0.98,0.92,0.99)")
TWO_EPS: Final[Check] = (_is_list_of(2, _is_amount), "must be two numbers, such as (1e-30,1e-3)")

Settings = Mapping[str, Check]


@dataclass(frozen=True)
class OptimizerKind:
    """A known optimizer: `class_name` in `module`, always made with `fixed`; `settings` may be given.

    `finds_rate`: it finds its own rate, and the learning rate is a factor on it, usually 1. `is_schedule_free`: it has
    no schedule, and the weights it trains are not those to use (Defazio et al., "The Road Less Scheduled", 2024).
    `num_moments` is how many numbers it keeps for one that is trained, about; `is_8bit` when it keeps them in 8 bit.
    """

    module: str
    class_name: str
    settings: Settings
    num_moments: float
    fixed: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    finds_rate: bool = False
    is_schedule_free: bool = False
    is_8bit: bool = False


_ADAM: Final[Settings] = {"betas": BETAS, "eps": AMOUNT, "weight_decay": AMOUNT}
_TORCH: Final[Settings] = {"maximize": SWITCH, "foreach": SWITCH_OR_NONE, "fused": SWITCH_OR_NONE}
_8BIT: Final[Settings] = {"min_8bit_size": COUNT}
_PAGED: Final[Settings] = {"is_paged": SWITCH}
_SGD: Final[Settings] = {"momentum": PART, "dampening": PART, "weight_decay": AMOUNT, "nesterov": SWITCH}
_LION: Final[Settings] = {"betas": BETAS, "weight_decay": AMOUNT}
_DADAPT: Final[Settings] = {"weight_decay": AMOUNT, "log_every": COUNT_OR_ZERO, "d0": ABOVE_ZERO}
_GROWS: Final[Settings] = {"growth_rate": ABOVE_ZERO}
_FREE: Final[Settings] = {
    "weight_decay": AMOUNT,
    "r": NUMBER,
    "weight_lr_power": NUMBER,
    "foreach": SWITCH_OR_NONE,
}
_NESTEROV: Final = MappingProxyType({"momentum": 0.9, "nesterov": True})


def _bnb(class_name: str, settings: Settings, num_moments: float, **fixed: object) -> OptimizerKind:
    is_8bit = class_name.endswith("8bit")
    return OptimizerKind(
        "bitsandbytes.optim", class_name, settings, num_moments, MappingProxyType(fixed), is_8bit=is_8bit
    )


def _dadapt(class_name: str, settings: Settings, num_moments: float, *, module: str = "dadaptation") -> OptimizerKind:
    return OptimizerKind(module, class_name, {**_DADAPT, **settings}, num_moments, finds_rate=True)


def _schedule_free(class_name: str, settings: Settings, num_moments: float) -> OptimizerKind:
    return OptimizerKind("schedulefree", class_name, {**_FREE, **settings}, num_moments, is_schedule_free=True)


_DADAPT_ADAM: Final[Settings] = {**_GROWS, "betas": BETAS, "eps": AMOUNT, "decouple": SWITCH}
_DADAPT_ADAN: Final[Settings] = {**_GROWS, "betas": THREE_BETAS, "eps": AMOUNT, "no_prox": SWITCH}
_PREPRINT: Final = _dadapt("DAdaptAdamPreprint", _DADAPT_ADAM, 3, module="dadaptation.experimental")

OPTIMIZERS: Final[Mapping[str, OptimizerKind]] = MappingProxyType(
    {
        "AdamW": OptimizerKind("torch.optim", "AdamW", {**_ADAM, **_TORCH, "amsgrad": SWITCH}, 2),
        "AdamW8bit": _bnb("AdamW8bit", {**_ADAM, **_8BIT, **_PAGED}, 2),
        "PagedAdamW8bit": _bnb("PagedAdamW8bit", {**_ADAM, **_8BIT}, 2),
        "PagedAdamW": _bnb("PagedAdamW", {**_ADAM, **_8BIT}, 2),
        "PagedAdamW32bit": _bnb("PagedAdamW32bit", {**_ADAM, **_8BIT}, 2),
        "Lion": OptimizerKind(
            "lion_pytorch", "Lion", {**_LION, "use_triton": SWITCH, "decoupled_weight_decay": SWITCH}, 1
        ),
        "Lion8bit": _bnb("Lion8bit", {**_LION, **_8BIT, **_PAGED}, 1),
        "PagedLion8bit": _bnb("PagedLion8bit", {**_LION, **_8BIT}, 1),
        "SGDNesterov": OptimizerKind("torch.optim", "SGD", {**_SGD, **_TORCH}, 1, _NESTEROV),
        "SGDNesterov8bit": _bnb("SGD8bit", {**_SGD, **_8BIT}, 1, **_NESTEROV),
        "Adafactor": OptimizerKind(
            "transformers.optimization",
            "Adafactor",
            {
                "eps": TWO_EPS,
                "clip_threshold": ABOVE_ZERO,
                "decay_rate": NUMBER,
                "beta1": PART_OR_NONE,
                "weight_decay": AMOUNT,
                "scale_parameter": SWITCH,
                "relative_step": SWITCH,
                "warmup_init": SWITCH,
            },
            0.125,
        ),
        "Prodigy": OptimizerKind(
            "prodigyopt",
            "Prodigy",
            {
                **_ADAM,
                "beta3": PART_OR_NONE,
                "decouple": SWITCH,
                "use_bias_correction": SWITCH,
                "safeguard_warmup": SWITCH,
                "d0": ABOVE_ZERO,
                "d_coef": ABOVE_ZERO,
                "growth_rate": ABOVE_ZERO,
                "slice_p": COUNT,
            },
            4,
            finds_rate=True,
        ),
        "AdamWScheduleFree": _schedule_free(
            "AdamWScheduleFree", {"betas": BETAS, "eps": AMOUNT, "warmup_steps": COUNT_OR_ZERO}, 2
        ),
        "RAdamScheduleFree": _schedule_free(
            "RAdamScheduleFree", {"betas": BETAS, "eps": AMOUNT, "silent_sgd_phase": SWITCH}, 2
        ),
        "SGDScheduleFree": _schedule_free("SGDScheduleFree", {"momentum": PART, "warmup_steps": COUNT_OR_ZERO}, 1),
        "DAdaptation": _PREPRINT,
        "DAdaptAdamPreprint": _PREPRINT,
        "DAdaptAdaGrad": _dadapt("DAdaptAdaGrad", {**_GROWS, "momentum": PART, "eps": AMOUNT}, 4),
        "DAdaptAdam": _dadapt("DAdaptAdam", {**_DADAPT_ADAM, "use_bias_correction": SWITCH}, 3),
        "DAdaptAdan": _dadapt("DAdaptAdan", _DADAPT_ADAN, 5),
        "DAdaptAdanIP": _dadapt("DAdaptAdanIP", _DADAPT_ADAN, 5, module="dadaptation.experimental"),
        "DAdaptLion": _dadapt("DAdaptLion", {"betas": BETAS}, 2),
        "DAdaptSGD": _dadapt("DAdaptSGD", {**_GROWS, "momentum": PART}, 3),
    }
)
"""Optimizer -> what is known about it."""

OPTIMIZER_FLAGS: Final[Mapping[str, str]] = MappingProxyType(
    {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
)
"""Old flags, and the optimizer that each stands for."""

TORCH_OPTIMIZERS: Final = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "ASGD",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
"""Other classes of `torch.optim` that train dense weights without a closure; spelt as there."""

EPS_IN_FP16: Final = 1e-4
"""An `eps` from here on keeps the quotients of Adam's kind within fp16; its usual 1e-8 is 0 there."""
_DIVIDES_IN_ITS_TYPE: Final = (
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "AdamWScheduleFree",
    "NAdam",
    "RAdamScheduleFree",
    "RMSprop",
)
"""They compute in the type of the weights unless torch's fused kernel, which computes in float32, is used."""

_DOTTED: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def optimizer_name(value: str) -> str:
    """A known name in its own spelling, whatever the case; other class names and dotted paths as they are.

    Raises `ValueError`, with the rest of a sentence, for what can be neither. Empty is the default, AdamW.
    """
    name = value.strip()
    if not name:
        return "AdamW"
    known = {known.lower(): known for known in (*TORCH_OPTIMIZERS, *OPTIMIZERS)}
    if name.lower() in known:
        return known[name.lower()]
    if _DOTTED.fullmatch(name):
        return name
    near = nearest(name, known)
    names = ", ".join(OPTIMIZERS)
    raise ValueError(
        f"must be one of {names}, another class of torch.optim, or a dotted path such as package.Class"
        + (f"; did you mean {known[near]}?" if near else "")
    )


class _OptimizerChoice(Protocol):
    @property
    def optimizer_type(self) -> str: ...


def wanted_optimizer(options: _OptimizerChoice) -> str:
    """The optimizer's name with the old flags taken into account."""
    return next((name for flag, name in OPTIMIZER_FLAGS.items() if getattr(options, flag)), options.optimizer_type)


def moments_of(optimizer_type: str) -> tuple[float, bool]:
    """(numbers kept for each that is trained, whether in 8 bit); two, as AdamW, for classes that are not known."""
    kind = OPTIMIZERS.get(optimizer_type)
    return (2, False) if kind is None else (kind.num_moments, kind.is_8bit)


def is_schedule_free(optimizer_type: str) -> bool:
    """Whether it does without a schedule; by its name for a class of another package, as in the reference trainer."""
    kind = OPTIMIZERS.get(optimizer_type)
    return kind.is_schedule_free if kind is not None else optimizer_type.lower().endswith("schedulefree")


def finds_rate(optimizer_type: str) -> bool:
    """Whether it finds its own rate and takes the learning rate as a factor on it."""
    kind = OPTIMIZERS.get(optimizer_type)
    return kind.finds_rate if kind is not None else "prodigy" in optimizer_type.lower()


def sets_own_rate(optimizer_type: str, arguments: Mapping[str, object]) -> bool:
    """Whether this is Adafactor with `relative_step`, its default: then neither rate nor schedule is of use."""
    return optimizer_type == "Adafactor" and (
        arguments.get("relative_step", True) is True or arguments.get("warmup_init") is True
    )


def loses_fp16(optimizer_type: str, arguments: Mapping[str, object]) -> bool:
    """Whether weights in fp16 become infinite or no numbers in its first steps: it divides by `eps` in their own type."""
    if optimizer_type.rpartition(".")[2] not in _DIVIDES_IN_ITS_TYPE:
        return False
    eps = arguments.get("eps")
    if arguments.get("fused") is True or (_is_number(eps) and cast("float", eps) >= EPS_IN_FP16):
        return False
    # AdamW is fused unless something else is asked for.
    return optimizer_type != "AdamW" or "foreach" in arguments or "fused" in arguments
