"""The texts of the page: every language has all of them, with the same placeholders, and the code asks for none that is not there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from fluxgui.fields import ALL_NAMES
from fluxgui.language import DEFAULT, LANGUAGES, NAMES, choose_language, say, texts
from trainer.schema.options import Options

CODE = Path(__file__).parents[2] / "fluxgui"
PAGES = sorted(path.stem for path in (LANGUAGES / DEFAULT).glob("*.toml"))


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def asked_for() -> Iterator[tuple[str, set[str] | None]]:
    """Every `say("name", ...)` of the page's code: the name and what it fills in (None when that is computed)."""
    for path in CODE.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say" and node.args:
                name = node.args[0]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    words = [keyword.arg for keyword in node.keywords]
                    yield name.value, None if None in words else {word for word in words if word is not None}


@pytest.mark.parametrize("language", sorted(set(NAMES) - {DEFAULT}))
@pytest.mark.parametrize("page", PAGES)
def test_every_language_says_everything(language: str, page: str) -> None:
    english, other = texts(DEFAULT, page), texts(language, page)
    assert set(other) == set(english)
    for key, text in other.items():
        assert placeholders(text) == placeholders(english[key]), key
        assert text.strip()


def test_the_names_of_options_in_another_language_are_those_of_the_forms_options() -> None:
    asked = {name for name in ALL_NAMES if name in Options.model_fields}
    for language in sorted(set(NAMES) - {DEFAULT}):
        assert set(texts(language, "fields")) == asked | {f"{name}_help" for name in asked}


def test_the_code_asks_for_texts_that_are_there() -> None:
    found = list(asked_for())
    assert found
    for name, words in found:
        page, _, key = name.partition(".")
        assert key in texts(DEFAULT, page), name
        if words is not None:
            assert words == placeholders(texts(DEFAULT, page)[key]), name


def test_a_language_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxgui.language._chosen", [])
    monkeypatch.setenv("FLUXGUI_LANGUAGE", "zh")
    assert "训练" in say("page.subtitle")
    choose_language("en")
    assert "LoRA" in say("page.subtitle")
    with pytest.raises(ValueError, match="en, zh"):
        choose_language("xx")
