"""The text of `--help`, made from the options themselves."""

from __future__ import annotations

import textwrap
from typing import Final

from trainer.schema.base import GROUP_TITLES, OptionStatus, shown
from trainer.schema.option_reference import usable_choices
from trainer.schema.option_status import STATUS

_WIDTH: Final = 110
_INDENT: Final = 8
_MAX_CHOICES: Final = 60
"""Characters of choices that stand beside the option; longer ones go below it."""
_VALUE_NAMES: Final = {"text": "TEXT", "path": "PATH", "integer": "N", "number": "X", "steps": "N|X|P%"}


def help_text() -> str:
    """Every option by group, with its default, and the reason where it has no effect or is refused."""
    lines = [
        "Train a LoRA for FLUX.1. Options are those of sd-scripts' flux_train_network.py; [ours] marks the others.",
        "Names may be shortened while they stay unambiguous. --config_file values stand below the command line.",
        "",
        "  -h, --help",
        *_entry("Show this text."),
    ]
    for title in GROUP_TITLES:
        names = [name for name, status in STATUS.items() if status.group == title]
        lines += ["", f"{title}:"] if names else []
        for name in names:
            lines += [
                f"  --{name}{_value(name)}{_mark(STATUS[name])}",
                *_entry(_description(STATUS[name]) + _long_choices(name)),
            ]
    return "\n".join(lines) + "\n"


def _entry(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)


def _mark(status: OptionStatus) -> str:
    marks = {"inert": " [no effect]", "refused": " [refused]", "supported": " [ours]" if status.is_ours else ""}
    return marks[status.status]


def _description(status: OptionStatus) -> str:
    unit = f" In {status.unit}." if status.unit else ""
    reason = f" {status.reason[0].upper()}{status.reason[1:]}." if status.reason else ""
    return f"{status.help}{unit}{_default(status)}{reason}"


def _value(name: str) -> str:
    status = STATUS[name]
    if status.value_type == "flag":
        return ""
    choices = ",".join(usable_choices(name))
    word = "{" + choices + "}" if 0 < len(choices) <= _MAX_CHOICES else _VALUE_NAMES[status.value_type]
    return f" [{word} ...]" if status.is_list else f" {word}"


def _long_choices(name: str) -> str:
    choices = usable_choices(name)
    return f" Known: {', '.join(choices)}." if len(",".join(choices)) > _MAX_CHOICES else ""


def _default(status: OptionStatus) -> str:
    if status.default is None or status.value_type == "flag":
        return ""
    return f" Default: {shown(status.default)}."
