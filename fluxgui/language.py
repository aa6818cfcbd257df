"""What the page says, in the language that was chosen. The text of each language stands in its folder of `languages/`.

A text is named `page.name`: `languages/en/page.toml` holds `name = "..."`, with `{placeholders}` as in `str.format`.
English is complete; what another language lacks is said in English.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Final

import tomlkit

LANGUAGES: Final = Path(__file__).parent / "languages"
NAMES: Final = {"en": "English", "zh": "中文"}
DEFAULT: Final = "en"

_chosen: list[str] = []


def choose_language(language: str) -> None:
    """What `say` speaks from now on. Raises `ValueError` for a language that has no texts."""
    if language not in NAMES:
        raise ValueError(f"there are no texts in {language!r}; the languages are {', '.join(NAMES)}")
    _chosen[:] = [language]


def language() -> str:
    """The language in use: the chosen one, else FLUXGUI_LANGUAGE, else English."""
    asked = _chosen[0] if _chosen else os.environ.get("FLUXGUI_LANGUAGE", DEFAULT)
    return asked if asked in NAMES else DEFAULT


def say(name: str, /, **values: object) -> str:
    """The text called `name` (`page.name`), with its placeholders filled. Raises `KeyError` for a name without text."""
    page, _, key = name.partition(".")
    text = texts(language(), page).get(key)
    if text is None:
        text = texts(DEFAULT, page)[key]
    return text.format_map(values) if values else text


@lru_cache
def texts(language: str, page: str) -> dict[str, str]:
    """All texts of a page in a language, by name; empty when the language has none for it."""
    path = LANGUAGES / language / f"{page}.toml"
    if not path.exists():
        return {}
    return {key: str(value) for key, value in tomlkit.parse(path.read_text(encoding="utf-8")).unwrap().items()}
