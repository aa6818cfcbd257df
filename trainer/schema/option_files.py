"""Options files: TOML to values, and options back to TOML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import tomlkit

from trainer.schema.options import GROUPS, SECRET_OPTIONS, Options
from trainer.schema.toml_table import read_table


def non_default_values(options: Options) -> dict[str, object]:
    """The options that are not at their default, in the order of `GROUPS`. A 1.0 is not the same as a default of 1."""
    values: dict[str, object] = {}
    for group in GROUPS.values():
        for name, info in group.model_fields.items():
            value = cast("object", getattr(options, name))
            default = cast("object", info.get_default())
            if value != default or type(value) is not type(default):
                values[name] = value
    return values


def options_to_toml(options: Options) -> str:
    """An options file that gives exactly these options; only what is not at its default is written,
    and no secret."""
    document = tomlkit.document()
    values = {name: value for name, value in non_default_values(options).items() if name not in SECRET_OPTIONS}
    for title, group in GROUPS.items():
        chosen = {name: _toml_value(values[name]) for name in group.model_fields if name in values}
        if chosen:
            document.add(title, tomlkit.item(chosen))
    return tomlkit.dumps(document)


def _toml_value(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_toml_value(item) for item in cast("Sequence[object]", value)]
    return value


def read_config_file(path: Path) -> dict[str, object]:
    """The values of an options file by name, unchecked. Sections mean nothing; the last of equal names counts.

    `.toml` may be left off. Raises `UserError` (exit code 2) when the file is missing or is not TOML.
    """
    return {name: value for _, values in read_config_sections(path) for name, value in values.items()}


def read_config_sections(path: Path) -> list[tuple[str, dict[str, object]]]:
    """The same with the section of each value; "" stands for the part before the first section."""
    path = options_path(path)
    parsed = read_table(path, "options file", "config_file")
    top: dict[str, object] = {}
    sections: list[tuple[str, dict[str, object]]] = []
    for name, value in parsed.items():
        if isinstance(value, dict):
            sections.append((name, cast("dict[str, object]", value)))
        else:
            top[name] = value
    return [("", top), *sections]


def options_path(path: Path) -> Path:
    """The file that is meant by `path`: `.toml` may be left off."""
    return path if path.suffix == ".toml" else path.parent / f"{path.name}.toml"
