"""What is known about every option, supported or not: computed from the groups and the table of the others."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Union, cast

from pydantic.fields import FieldInfo

from trainer.schema.base import Opt, OptionStatus, ValueType
from trainer.schema.option_table import NOT_SUPPORTED, OPEN_TEXT, REFUSED_VALUES
from trainer.schema.options import GROUPS, OUR_OPTIONS, Options


def opt_of(name: str) -> Opt:
    """What the help and the form say about a supported option."""
    return next(entry for entry in Options.model_fields[name].metadata if isinstance(entry, Opt))


def _parts(annotation: object) -> Iterator[object]:
    """The alternatives of a type, with `Annotated` and nested unions taken apart."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _parts(typing.get_args(annotation)[0])
    elif origin is Union or origin is types.UnionType:
        for part in typing.get_args(annotation):
            yield from _parts(part)
    elif annotation is not type(None):
        yield annotation


def literals(annotation: object) -> Iterator[str]:
    for part in _parts(annotation):
        if typing.get_origin(part) is Literal:
            yield from (str(value) for value in typing.get_args(part))


def _metadata(info: FieldInfo) -> Iterator[object]:
    """What stands beside a field's type; for a list, beside that of its items, and beside one of several types."""
    yield from info.metadata
    for part in typing.get_args(info.annotation):
        if typing.get_origin(part) is Annotated:
            yield from (found for entry in typing.get_args(part)[1:] for found in getattr(entry, "metadata", (entry,)))
    for part in _parts(info.annotation):
        for item in typing.get_args(part):
            if typing.get_origin(item) is Annotated:
                for entry in typing.get_args(item)[1:]:
                    yield from getattr(entry, "metadata", (entry,))


def bounds_text(info: FieldInfo) -> str | None:
    """The range that a value must lie in, in words, such as "1 to 1024"; None where there is none."""
    found: dict[str, Any] = {}
    for entry in _metadata(info):
        for key in ("ge", "gt", "le", "lt"):
            if getattr(entry, key, None) is not None:
                found[key] = getattr(entry, key)
    if "ge" in found and "le" in found:
        return f"{found['ge']} to {found['le']}"
    if "ge" in found and "lt" in found:
        return f"at least {found['ge']} and below {found['lt']}"
    if "ge" in found:
        return f"{found['ge']} or more"
    return f"above {found['gt']}" if "gt" in found else None


def _status_of_field(group: str, name: str, info: FieldInfo) -> OptionStatus:
    opt = opt_of(name)
    parts = list(_parts(info.annotation))
    is_list = typing.get_origin(parts[0]) is tuple
    if is_list:
        parts = list(_parts(typing.get_args(parts[0])[0]))
    refused = REFUSED_VALUES.get(name, {})
    choices: tuple[str, ...] = ()
    value_type: ValueType
    if typing.get_origin(parts[0]) is Literal:
        value_type = "text"
        if name not in OPEN_TEXT:
            choices = (*(str(value) for value in typing.get_args(parts[0])), *refused)
    elif bool in parts:
        value_type = "flag"
    elif int in parts and float in parts:
        value_type = "steps"
    elif float in parts:
        value_type = "number"
    elif int in parts:
        value_type = "integer"
    else:
        value_type = "path" if Path in parts else "text"
    return OptionStatus(
        "supported",
        value_type,
        choices=choices,
        is_list=is_list,
        default=cast("object", info.get_default()),
        is_ours=name in OUR_OPTIONS,
        refused_values=MappingProxyType(refused),
        group=group,
        level=opt.level,
        help=opt.help,
        unit=opt.unit,
        bounds=bounds_text(info),
    )


STATUS: Final[Mapping[str, OptionStatus]] = MappingProxyType(
    {
        **{
            name: _status_of_field(title, name, Options.model_fields[name])
            for title, group in GROUPS.items()
            for name in group.model_fields
        },
        **NOT_SUPPORTED,
    }
)
"""Every option of the reference trainer and of ours, by name."""


OPEN_TEXT_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {name: tuple(literals(Options.model_fields[name].annotation)) for name in sorted(OPEN_TEXT)}
)
"""What may be given where the reference takes any text."""


def kind_of_value(status: OptionStatus) -> str:
    kinds = {
        "flag": "true or false",
        "text": "text",
        "path": "a path",
        "integer": "a whole number",
        "number": "a number",
        "steps": "a number of steps, or a part of the run such as 0.1 or 10%",
    }
    return f"{kinds[status.value_type]}{', or several' if status.is_list else ''}"


def refusal(name: str, reason: str, where: str) -> tuple[str, str, str | None]:
    """(what, where, hint) of an option or key that is not carried out, from its reason in the table."""
    what, _, hint = reason.partition("; ")
    # A reason is "it is not supported yet; ..." or a sentence about the feature behind the option.
    text = f"{name} {what.removeprefix('it ')}" if what.startswith("it ") else f"{name} cannot be used: {what}"
    return text, where, sentence(hint)


def sentence(text: str) -> str | None:
    return f"{text[0].upper()}{text[1:]}." if text else None
