"""The texts of `optimizer_args` and `lr_scheduler_args`, `key=value` each, as keyword arguments."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, cast

from trainer.schema.base import Problem, UserError, nearest
from trainer.schema.optimizers import OPTIMIZERS, Settings

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

    For an `optimizer_type` that is known by name, names and values are held against what it takes; those of other
    classes are held against the class when it is made. Raises `UserError` (exit code 2) with every problem.
    """
    kind = OPTIMIZERS.get(optimizer_type) if optimizer_type is not None else None
    settings = None if kind is None else kind.settings
    return parse_arguments(optimizer_args, settings, "optimizer_args", optimizer_type or "the optimizer")


def parse_arguments(
    pairs: Sequence[str] | None, settings: Settings | None, field: str, owner: str
) -> dict[str, object]:
    """`key=value` texts of the option `field` as keyword arguments of `owner`; with `settings` names and values are checked."""
    problems: list[Problem] = []
    values: dict[str, object] = {}

    def complain(what: str, hint: str | None = None) -> None:
        problems.append(Problem(what, f"--{field}", hint, field))

    for pair in pairs or ():
        name, equals, text = (piece.strip() for piece in pair.partition("="))
        if not equals or not name:
            complain(f'"{pair}" is not of the form key=value', "Write it without spaces, such as weight_decay=0.01.")
            continue
        if settings is not None and name not in settings:
            near = nearest(name, settings)
            takes = f"It takes {', '.join(settings)}." if settings else "It takes none."
            hint = f"Did you mean {near}?" if near else takes
            complain(f"{owner} has no setting {name}", _BETTER_PLACE.get(name, hint))
            continue
        try:
            value = cast("object", ast.literal_eval(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = float("inf") if text == "inf" else text
            if settings is None and value is text:
                complain(f"{name} is {text}; it must be a number, True, False, None or a tuple")
        if settings is not None:
            is_right, expected = settings[name]
            if not is_right(value):
                complain(f"{name} is {text}; it {expected}")
        values[name] = tuple(cast("list[object]", value)) if isinstance(value, list) else value
    if problems:
        raise UserError.many(problems, exit_code=2)
    return values
