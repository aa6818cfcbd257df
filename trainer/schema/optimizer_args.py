"""The texts of `optimizer_args`, `key=value` each, as values for the optimizer."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, cast

from trainer.schema.base import Problem, UserError, nearest


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_switch_or_none(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_positive_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_betas(value: object) -> bool:
    if not isinstance(value, (tuple, list)):
        return False
    betas = cast("Sequence[object]", value)
    return len(betas) == 2 and all(_is_amount(beta) and cast("float", beta) < 1 for beta in betas)


_Check = tuple[Callable[[object], bool], str]
_SWITCH: Final[_Check] = (_is_switch, "must be True or False")
_SWITCH_OR_NONE: Final[_Check] = (_is_switch_or_none, "must be True, False or None")
_AMOUNT: Final[_Check] = (_is_amount, "must be a number, 0 or more")
_COMMON: Final[Mapping[str, _Check]] = {
    "betas": (_is_betas, "must be two numbers below 1, such as (0.9,0.999)"),
    "eps": _AMOUNT,
    "weight_decay": _AMOUNT,
}
OPTIMIZER_SETTINGS: Final[Mapping[str, Mapping[str, _Check]]] = MappingProxyType(
    {
        "AdamW": MappingProxyType(
            {
                **_COMMON,
                "amsgrad": _SWITCH,
                "maximize": _SWITCH,
                "foreach": _SWITCH_OR_NONE,
                "fused": _SWITCH_OR_NONE,
            }
        ),
        "AdamW8bit": MappingProxyType(
            {
                **_COMMON,
                "min_8bit_size": (_is_positive_count, "must be a whole number, 1 or more"),
                "is_paged": _SWITCH,
            }
        ),
    }
)
"""Optimizer -> its settings, each with what its value must be."""

_BETTER_PLACE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "lr": "Use --learning_rate.",
        "learning_rate": "Use --learning_rate.",
        "percentile_clipping": "bitsandbytes does not have it any more; use --max_grad_norm.",
        "block_wise": "bitsandbytes always works block by block now; leave it out.",
    }
)


def parse_optimizer_args(optimizer_args: Sequence[str] | None, optimizer_type: str | None = None) -> dict[str, object]:
    """`["weight_decay=0.1", "betas=(0.9,0.99)"]` as keyword arguments; values are Python literals.

    With `optimizer_type` (`AdamW` or `AdamW8bit`) names and values are held against what that optimizer takes. Raises
    `UserError` (exit code 2) with every problem.
    """
    problems: list[Problem] = []
    values: dict[str, object] = {}

    def complain(what: str, hint: str | None = None) -> None:
        problems.append(Problem(what, "--optimizer_args", hint, "optimizer_args"))

    known = OPTIMIZER_SETTINGS[optimizer_type] if optimizer_type is not None else None
    for pair in optimizer_args or ():
        name, equals, text = (piece.strip() for piece in pair.partition("="))
        if not equals or not name:
            complain(f'"{pair}" is not of the form key=value', "Write it without spaces, such as weight_decay=0.01.")
            continue
        if known is not None and name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {near}?" if near else f"It takes {', '.join(known)}."
            complain(f"{optimizer_type} has no setting {name}", _BETTER_PLACE.get(name, hint))
            continue
        try:
            value = cast("object", ast.literal_eval(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
            if known is None:
                complain(f"{name} is {text}; it must be a number, True, False, None or a tuple")
        if known is not None:
            is_right, expected = known[name]
            if not is_right(value):
                complain(f"{name} is {text}; it {expected}")
        values[name] = tuple(cast("list[object]", value)) if isinstance(value, list) else value
    if problems:
        raise UserError.many(problems, exit_code=2)
    return values
