"""One TOML or JSON file as a table of plain values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from trainer.schema.base import UserError

_EXIT_OPTIONS: Final = 2


def read_table(path: Path, noun: str, field: str) -> dict[str, object]:
    """The file's content; `.json` is JSON, anything else TOML. Raises `UserError` (exit code 2) that calls it `noun`."""
    where = str(path)
    is_json = path.suffix.lower() == ".json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        what, hint = f"this {noun} does not exist", f"Check --{field} for a typing error."
        raise UserError(what, where, hint, field=field, exit_code=_EXIT_OPTIONS) from None
    except UnicodeDecodeError:
        what, hint = f"this {noun} is not UTF-8 text", "Save it as UTF-8."
        raise UserError(what, where, hint, field=field, exit_code=_EXIT_OPTIONS) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        what = f"this {noun} cannot be read ({reason})"
        raise UserError(what, where, f"It is given as --{field}.", field=field, exit_code=_EXIT_OPTIONS) from None
    try:
        parsed = cast("object", json.loads(text) if is_json else tomlkit.parse(text).unwrap())
    except (TOMLKitError, ValueError, RecursionError) as error:
        what = f"this {noun} is not valid {'JSON' if is_json else 'TOML'}: {error}"
        hint = (
            "Nothing but spaces may stand after the last entry of a list or table: no comma."
            if is_json
            else "Texts stand in \"double quotes\", Windows paths in 'single quotes'."
        )
        raise UserError(what, where, hint, field=field, exit_code=_EXIT_OPTIONS) from None
    if not isinstance(parsed, dict):
        raise UserError(f"this {noun} holds no table", where, field=field, exit_code=_EXIT_OPTIONS)
    return cast("dict[str, object]", parsed)
