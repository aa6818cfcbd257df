"""What bulk changes make of a caption: text in, text out. No files, no gradio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import regex

from fluxgui.datasets import tags_of
from fluxgui.language import say
from trainer.schema.base import UserError

REGEX_SECONDS: Final = 1.0
"""An expression that takes longer on one caption is given up: some never end."""

Rule = Callable[[str], str]


def with_prefix(prefix: str) -> Rule:
    """`prefix` before the caption, set off by a space unless it ends in one or in a sign of its own."""
    return lambda caption: caption if not prefix.strip() else f"{prefix.strip()}{_gap(prefix, caption)}{caption}"


def with_suffix(suffix: str) -> Rule:
    """`suffix` after the caption; set off by a space unless it starts with a comma or a full stop."""

    def apply(caption: str) -> str:
        text = suffix.strip()
        if not text:
            return caption
        gap = "" if not caption or text[0] in ",.;:!?" else " "
        return f"{caption}{gap}{text}"

    return apply


def _gap(prefix: str, caption: str) -> str:
    return " " if prefix.strip() and caption else ""


def with_trigger(word: str) -> Rule:
    """The trigger word as the first tag; captions that name it anywhere stay as they are."""
    trigger = word.strip()
    named = regex.compile(rf"(?<!\w){regex.escape(trigger)}(?!\w)", regex.IGNORECASE)

    def apply(caption: str) -> str:
        if not trigger or named.search(caption):
            return caption
        return f"{trigger}, {caption}" if caption else trigger

    return apply


def replacing(find: str, replacement: str, *, is_regex: bool) -> Rule:
    """Every `find` becomes `replacement`. Raises `UserError` for an expression that cannot be read or takes forever."""
    if not find:
        return lambda caption: caption
    if not is_regex:
        return lambda caption: caption.replace(find, replacement)
    try:
        pattern = regex.compile(find)
    except regex.error as error:
        raise UserError(say("dataset.bad_regex", reason=error)) from None

    def apply(caption: str) -> str:
        try:
            return pattern.sub(replacement, caption, timeout=REGEX_SECONDS)
        except TimeoutError:
            raise UserError(say("dataset.slow_regex")) from None
        except (regex.error, IndexError) as error:  # a group in the replacement that the expression has not
            raise UserError(say("dataset.bad_regex", reason=error)) from None

    return apply


def without_tag(tag: str) -> Rule:
    """The caption without the tag, the other tags as they are."""
    return lambda caption: ", ".join(each for each in tags_of(caption) if each != tag) if tag else caption
