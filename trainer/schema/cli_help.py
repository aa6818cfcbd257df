"""The text of `--help`, made from the options themselves."""

from __future__ import annotations

import textwrap
from typing import Final

from trainer.schema.base import shown
from trainer.schema.option_status import OPEN_TEXT_CHOICES, STATUS, opt_of
from trainer.schema.option_table import OptionStatus
from trainer.schema.options import GROUPS

_WIDTH: Final = 110
_INDENT: Final = 8
_VALUE_NAMES: Final = {"text": "TEXT", "path": "PATH", "integer": "N", "number": "X", "steps": "N|X|P%"}


def help_text() -> str:
    """Every option by group, with its default; then those without effect and those that are not supported."""
    lines = [
        "Train a LoRA for FLUX.1. Options are those of sd-scripts' flux_train_network.py; [ours] marks the others.",
        "Names may be shortened while they stay unambiguous. --config_file values stand below the command line.",
        "",
        "  -h, --help",
        *_entry("Show this text."),
    ]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        for name in group.model_fields:
            status, opt = STATUS[name], opt_of(name)
            mark = " [ours]" if status.is_ours else ""
            unit = f" In {opt.unit}." if opt.unit else ""
            lines += [f"  --{name}{_value(name, status)}{mark}", *_entry(f"{opt.help}{unit}{_default(status)}")]
    for kind, title in (("inert", "accepted without effect:"), ("refused", "not supported:")):
        lines += ["", title]
        for name, status in STATUS.items():
            if status.status == kind:
                lines += [f"  --{name}{_value(name, status)}", *_entry(f"{status.reason}.")]
    return "\n".join(lines) + "\n"


def _entry(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)


def _value(name: str, status: OptionStatus) -> str:
    if status.value_type == "flag":
        return ""
    choices = [choice for choice in status.choices if choice not in status.refused_values]
    choices = choices or list(OPEN_TEXT_CHOICES.get(name, ()))
    word = "{" + ",".join(choices) + "}" if choices else _VALUE_NAMES[status.value_type]
    return f" [{word} ...]" if status.is_list else f" {word}"


def _default(status: OptionStatus) -> str:
    if status.default is None or status.value_type == "flag":
        return ""
    return f" Default: {shown(status.default)}."
