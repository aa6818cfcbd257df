"""Every option of the trainer as a form that can be searched. It writes the lines of *More options* and reads them back.

Those lines are the only place where a value is kept, so that presets, the check and the preview know of one thing. The
rows come from the one definition of all options; what has a field of its own on the page is named and leads there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Final, cast

from fluxgui.fields import ALL_NAMES
from fluxgui.language import say
from trainer.schema.base import GROUP_TITLES
from trainer.schema.option_reference import reference_rows
from trainer.schema.options import SECRET_OPTIONS

SCRIPT: Final = Path(__file__).with_suffix(".js")
LEVELS: Final = ("basic", "advanced", "expert")
WRITTEN_BY_THE_PAGE: Final = frozenset(
    {
        "output_dir",
        "dataset_config",
        "sample_prompts",
        "train_data_dir",
        "reg_data_dir",
        "in_json",
        "config_file",
        "output_config",
        "run_dir",
    }
)
"""The run's folder and its files, which the page makes itself."""

Row = Mapping[str, object]


def can_be_set(row: Row) -> bool:
    """Whether the option is a question of this form: supported, without a field of its own, and no secret."""
    name = str(row["name"])
    return row["status"] == "supported" and name not in WRITTEN_BY_THE_PAGE | SECRET_OPTIONS | set(ALL_NAMES)


def all_options_html() -> str:
    """The whole form. `all_options.js` brings it to life."""
    rows = reference_rows()
    parts = [_bar()]
    for group, title in GROUP_TITLES.items():
        in_group = [row for row in rows if row["group"] == group]
        if in_group:
            inner = "".join(_row(row) for row in in_group)
            parts.append(
                f'<details class="options-group"><summary>{escape(title)} '
                f'<span class="options-count"></span></summary>{inner}</details>'
            )
    parts.append(f'<p class="options-none empty" hidden>{escape(say("options.none"))}</p>')
    return f'<div class="all-options">{"".join(parts)}</div>'


def script() -> str:
    """The JavaScript for `gr.HTML`'s js_on_load, with its texts."""
    texts = {"changed": say("options.changed_count"), "unreadable": say("options.unreadable")}
    # In a function of its own: names such as `watch` are taken around it.
    return f"(() => {{\nconst TEXTS = {json.dumps(texts)};\n{SCRIPT.read_text(encoding='utf-8')}}})();"


def _bar() -> str:
    levels = "".join(f'<option value="{level}">{escape(say(f"options.{level}"))}</option>' for level in LEVELS)
    return (
        '<div class="options-bar">'
        f'<label>{escape(say("options.search"))} <input type="search" id="options-search" autocomplete="off"></label>'
        f'<label>{escape(say("options.level"))} <select id="options-level">{levels}</select></label>'
        f'<label class="tick"><input type="checkbox" id="options-changed"> {escape(say("options.only_changed"))}</label>'
        f'<button type="button" id="options-reset">{escape(say("options.reset_all"))}</button>'
        '<span id="options-status" role="status"></span></div>'
    )


def _row(row: Row) -> str:
    name, level = str(row["name"]), str(row["level"])
    settable = can_be_set(row)
    facts = [str(fact) for fact in (row["unit"], row["range"]) if fact]
    facts.append(say("options.default", value=_shown(row["default"])))
    if row["ours"]:
        facts.append(say("options.ours"))
    note = "" if settable else f'<p class="options-note">{_why_not(row)}</p>'
    reset = (
        f'<button type="button" class="options-back" aria-label="{escape(say("options.reset", name=name), quote=True)}" '
        f"hidden>{escape(say('options.reset_short'))}</button>"
        if settable
        else ""
    )
    words = f"{name} {name.replace('_', ' ')} {row['help']}".lower()
    return (
        f'<div class="option{"" if settable else " off"}" data-name="{name}" data-level="{level}" '
        f'data-words="{escape(words, quote=True)}">'
        f'<label for="option-{name}"><code>{name}</code></label>{_control(row) if settable else ""}{reset}'
        f'<p class="options-help" id="option-help-{name}">{escape(str(row["help"]))} '
        f'<span class="options-facts">{escape(" · ".join(facts))}</span></p>{note}</div>'
    )


def _why_not(row: Row) -> str:
    name = str(row["name"])
    if name in ALL_NAMES:
        return f'<a href="#field-{name}">{escape(say("options.own_field"))}</a>'
    if name in WRITTEN_BY_THE_PAGE:
        return escape(say("options.by_the_page"))
    if name in SECRET_OPTIONS:
        return escape(say("options.secret"))
    return escape(say(f"options.{row['status']}", reason=row["reason"] or ""))


def _control(row: Row) -> str:
    name = str(row["name"])
    common = f'id="option-{name}" data-type="{row["type"]}" aria-describedby="option-help-{name}"'
    choices = cast("list[str]", row["choices"])
    if row["type"] == "flag":
        return f'<input type="checkbox" {common}>'
    if row["list"]:
        hint = escape(say("options.one_per_line"), quote=True)
        return f'<textarea rows="2" data-list="1" placeholder="{hint}" spellcheck="false" {common}></textarea>'
    default = escape(_shown(row["default"]), quote=True)
    if choices:
        # A list to choose from that takes other answers too: the check knows what is right.
        listed = "".join(f'<option value="{escape(choice, quote=True)}">' for choice in choices)
        return (
            f'<input type="text" list="choices-{name}" placeholder="{default}" autocomplete="off" {common}>'
            f'<datalist id="choices-{name}">{listed}</datalist>'
        )
    return f'<input type="text" placeholder="{default}" autocomplete="off" spellcheck="false" {common}>'


def _shown(value: object) -> str:
    if value is None or value == "":
        return say("options.nothing")
    if isinstance(value, bool):
        return say("options.on") if value else say("options.off")
    return " ".join(str(item) for item in cast("list[object]", value)) if isinstance(value, list) else str(value)
