"""Values as they were given to checked options, with every problem and every line for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from trainer.schema.base import OptionStatus, Problem, nearest, shown, with_home
from trainer.schema.option_corrections import corrected, option_advice
from trainer.schema.option_rules import broken_rules
from trainer.schema.option_status import STATUS, bounds_text, kind_of_value, literals, refusal, sentence
from trainer.schema.option_table import OPEN_TEXT
from trainer.schema.options import Options


@dataclass(frozen=True)
class Given:
    """An option's value as it was given, as text or typed, and the place that an error message names."""

    value: object
    where: str


@dataclass(frozen=True)
class Reading:
    """`options` holds everything that is right; nothing may run on them while there are problems.

    `explicit` holds the supported options that were given.
    """

    options: Options
    explicit: frozenset[str]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def read_options(given: Mapping[str, Given]) -> Reading:
    """Check values by known names (`STATUS`): each by itself, then the rules between options.

    Refused options and values are problems, options without effect are notes.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    values: dict[str, object] = {}
    for name, entry in given.items():
        status = STATUS[name]
        value = _plain(status, entry.value)
        if status.status == "supported":
            problem = _refused_value(name, status, value, entry.where)
            if problem is not None:
                problems.append(problem)
            elif value is not None:
                values[name] = value
            continue
        typed, mistake = _typed(status, value)
        if mistake is not None:
            problems.append(Problem(f"{name} is {shown(value)}; it {mistake}", entry.where, field=name))
        elif typed == status.default:
            continue
        elif status.status == "inert":
            notes.append(f"{name} has no effect: {status.reason}")
        else:
            problems.append(Problem(*refusal(name, status.reason, entry.where), name))
    bad = {problem.field for problem in problems}
    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        for name, problem in _field_problems(error, values, given).items():
            problems.append(problem)
            bad.add(name)
        # The rest is right by itself, so its rules can be checked too.
        options = Options.model_validate({name: value for name, value in values.items() if name not in bad})
    explicit = frozenset(values)
    for names, problem in broken_rules(options, explicit):
        if not bad & set(names):
            place = next((given[name].where for name in names if name in given), problem.where)
            problems.append(Problem(problem.what, place, problem.hint, problem.field))
    options, corrections = corrected(options, explicit)
    if explicit & {"use_8bit_adam", "use_lion_optimizer"}:
        explicit |= {"optimizer_type"}
    return Reading(options, explicit, tuple(problems), (*corrections, *notes, *option_advice(options, explicit)))


def _plain(status: OptionStatus, value: object) -> object:
    """The value, None for an empty text where that means that nothing was given."""
    if status.value_type == "path" and isinstance(value, (list, tuple)):
        return tuple(with_home(item) if isinstance(item, str) else item for item in cast("Sequence[object]", value))
    if not isinstance(value, str):
        return value
    if not value.strip() and (status.default is None or status.value_type in ("number", "integer", "steps")):
        return None
    return with_home(value) if status.value_type == "path" else value


def _refused_value(name: str, status: OptionStatus, value: object, where: str) -> Problem | None:
    if isinstance(value, bool) and status.value_type in ("integer", "number", "steps"):
        return Problem(f"{name} is {shown(value)}; it must be {kind_of_value(status)}", where, field=name)
    if not isinstance(value, str):
        return None
    for refused, reason in status.refused_values.items():
        if value == refused or (name in OPEN_TEXT and value.casefold() == refused.casefold()):
            what, _, hint = f"{name} {value} {reason}".partition("; ")
            return Problem(what, where, sentence(hint), name)
    return None


def _typed(status: OptionStatus, value: object) -> tuple[object, str | None]:
    """The value of an option that is not carried out, as its type, or what is wrong with it."""
    if value is None:
        return status.default, None
    if status.is_list:
        items = cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else (value,)
        return (tuple(items) or None), None
    mistake = f"must be {kind_of_value(status)}"
    if status.value_type == "flag":
        words = {"true": True, "1": True, "false": False, "0": False}
        typed = words.get(shown(value).strip().lower())
        return typed, mistake if typed is None else None
    if status.choices and shown(value) not in status.choices:
        return None, f"must be one of {', '.join(status.choices)}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        return None, mistake
    if status.value_type in ("text", "path"):
        return str(value), None
    try:
        number = float(str(value).removesuffix("%") if status.value_type == "steps" else str(value))
    except ValueError:
        return None, mistake
    return (None, mistake) if status.value_type == "integer" and not number.is_integer() else (number, None)


def _field_problems(
    error: ValidationError, values: Mapping[str, object], given: Mapping[str, Given]
) -> dict[str, Problem]:
    """The first problem of each option that pydantic found."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        if name in problems:
            continue
        value = values[name]
        hint: str | None = None
        if detail["type"] == "value_error":
            expected = str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
        else:
            expected = f"must be {_expected(name, detail['type'])}"
        if detail["type"] == "literal_error":
            near = nearest(str(value), literals(Options.model_fields[name].annotation))
            hint = f"Did you mean {near}?" if near else None
        problems[name] = Problem(f"{name} is {shown(value)}; it {expected}", given[name].where, hint, name)
    return problems


def _expected(name: str, error_type: str) -> str:
    """What an option's value must be, after an error of pydantic's type `error_type`."""
    choices = tuple(literals(Options.model_fields[name].annotation))
    if choices and STATUS[name].value_type == "integer":
        return f"{kind_of_value(STATUS[name])}, {bounds_text(Options.model_fields[name])}, or {', '.join(choices)}"
    if choices:
        return f"one of {', '.join(choices)}"
    if error_type == "string_too_short":
        return "at least one character"
    bounds = bounds_text(Options.model_fields[name])
    if error_type in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return bounds or "0 or more"
    if error_type == "too_long":
        return "at most two numbers"
    kind = kind_of_value(STATUS[name])
    return f"{kind}, {bounds}" if bounds else kind
