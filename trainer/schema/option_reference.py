"""The reference of all options, from their definitions: as plain values for programs, and as a page for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from trainer.schema.base import GROUP_TITLES, OptionStatus, shown
from trainer.schema.option_status import OPEN_TEXT_CHOICES, STATUS, literals
from trainer.schema.options import Options

_TYPES: Final = {
    "flag": "switch",
    "text": "text",
    "path": "path",
    "integer": "whole number",
    "number": "number",
    "steps": "steps, or a part of the run",
}


def reference_rows() -> list[dict[str, object]]:
    """One row for each option, in the order of the groups. `range` is in words; `choices` are those that can be used."""
    return [
        {
            "name": name,
            "type": status.value_type,
            "list": status.is_list,
            "default": _plain(status.default),
            "choices": usable_choices(name),
            "refused_choices": dict(status.refused_values),
            "range": status.bounds,
            "unit": status.unit,
            "group": status.group,
            "level": status.level,
            "status": status.status,
            "reason": status.reason or None,
            "help": status.help,
            "ours": status.is_ours,
        }
        for group in GROUP_TITLES
        for name, status in STATUS.items()
        if status.group == group
    ]


def usable_choices(name: str) -> list[str]:
    """What may be given for an option that has choices; empty for any other."""
    status = STATUS[name]
    choices = [choice for choice in status.choices if choice not in status.refused_values]
    return choices or list(OPEN_TEXT_CHOICES.get(name, ()))


def reference_page() -> str:
    """The page `docs/options.md`."""
    counts = {
        kind: sum(status.status == kind for status in STATUS.values()) for kind in ("supported", "inert", "refused")
    }
    ours = sum(status.is_ours for status in STATUS.values())
    lines = [
        "# Options",
        "",
        "<!-- Made by `python -m trainer options --markdown > docs/options.md`; a test holds it against the program. -->",
        "",
        f"All {len(STATUS)} options: {len(STATUS) - ours} of sd-scripts' `flux_train_network.py` and {ours} of our own, "
        "which are marked.",
        f"{counts['supported']} are supported. {counts['inert']} are accepted without effect, which is said at the start "
        "with the reason.",
        f"{counts['refused']} are refused with the alternative. `python -m trainer options --json` gives the same to programs.",
        "",
        "An option is given as `--name value` or `--name=value`, or as `name = value` in the file of `--config_file`.",
        "Section names in that file mean nothing, `.toml` may be left off, and the command line wins.",
        "A name may be shortened while it stays unambiguous; the last of repeated options counts.",
        "The level says who needs an option: basic, advanced or expert.",
    ]
    for group, title in GROUP_TITLES.items():
        names = [name for name, status in STATUS.items() if status.group == group]
        if not names:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| Option | Values | Default | Level | What it does |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(name) for name in names]
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    status = STATUS[name]
    mark = " (ours)" if status.is_ours else ""
    cells = (f"`--{name}`{mark}", _values(name), _default(status), status.level, " ".join(_description(status)))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _values(name: str) -> str:
    status = STATUS[name]
    choices = usable_choices(name)
    text = ", ".join(f"`{choice}`" for choice in choices) if choices else _TYPES[status.value_type]
    if status.bounds is not None:
        text += f", {status.bounds}"
    if status.unit is not None and status.unit not in text:
        text += f" ({status.unit})"
    field = Options.model_fields.get(name)
    if field is not None and status.value_type == "integer" and (words := tuple(literals(field.annotation))):
        text += f", or {', '.join(f'`{word}`' for word in words)}"
    return f"{text}; one or more" if status.is_list else text


def _default(status: OptionStatus) -> str:
    if status.default is None or status.value_type == "flag":
        return ""
    return f"`{shown(status.default)}`" if status.default != "" else "empty"


def _description(status: OptionStatus) -> Iterator[str]:
    yield status.help
    if status.status == "inert":
        yield f"**No effect**: {status.reason}."
    elif status.status == "refused":
        yield f"**Refused**: {status.reason}."
    by_reason: dict[str, list[str]] = {}
    for value, reason in status.refused_values.items():
        by_reason.setdefault(reason, []).append(f"`{value}`")
    for reason, values in by_reason.items():
        yield f"Refused: {', '.join(values)} ({reason})."


def _plain(value: object) -> object:
    """A default as JSON has it."""
    return list(value) if isinstance(value, tuple) else value if isinstance(value, (str, int, float)) else None
