"""Presets: named sets of options, built into the program or kept by the user.

A preset is a TOML file with up to four tables: `[preset]` says what it is (title, description, kind, order, vram_gb),
`[options]` holds options as a config file does, `[dataset]` and `[form]` what the form asks beside the options. Presets
name what they change; everything else stays as it is.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from trainer.schema.base import Problem, UserError, nearest
from trainer.schema.cli import validate_options
from trainer.schema.folders import bin_dir, user_presets_dir
from trainer.schema.run_folder import write_atomic

logger = logging.getLogger("trainer")

PresetKind = Literal["vram", "purpose", "demo", "own"]

BUILT_IN_DIR: Final = Path(__file__).resolve().parents[2] / "presets"
MAX_NAME: Final = 60

_BUILT_IN_KINDS: Final[tuple[PresetKind, ...]] = ("purpose", "vram", "demo")
_HEAD_KEYS: Final = ("title", "description", "kind", "order", "vram_gb")
_DATASET_KEYS: Final = ("num_repeats",)
_FORM_KEYS: Final = ("sample_prompt_lines", "more_options")
_TABLES: Final = ("preset", "options", "dataset", "form")
# Device names that Windows takes for itself whatever the ending.
_RESERVED: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Preset:
    """One preset. `values` are by name of the form's field, which for an option is the option's name.

    A preset for a card also has the card's memory there, as `vram_gb`.
    """

    name: str
    title: str
    description: str
    kind: PresetKind
    values: Mapping[str, object]
    order: int = 0

    @property
    def is_built_in(self) -> bool:
        return self.kind != "own"


def list_presets() -> list[Preset]:
    """All presets: the built-in ones by kind and order, then the user's own by name.

    One of the user's files that cannot be used is left out and named in the log; `load_preset` says what is wrong.
    """
    built_in = [_read_preset(path, is_own=False) for path in sorted(BUILT_IN_DIR.glob("*.toml"))]
    built_in.sort(key=lambda preset: (_BUILT_IN_KINDS.index(preset.kind), preset.order, preset.title))
    own: list[Preset] = []
    for path in sorted(_own_files(), key=lambda path: path.stem.casefold()):
        try:
            _check_name(path.stem)
            own.append(_read_preset(path, is_own=True))
        except UserError as error:
            logger.warning("this preset is left out: %s", error)
    return [*built_in, *own]


def load_preset(name: str) -> Preset:
    """The preset of that name. Raises `UserError` when there is none, or when its file cannot be used."""
    _check_name(name, is_own=False)
    for path in BUILT_IN_DIR.glob("*.toml"):
        if path.stem == name:
            return _read_preset(path, is_own=False)
    for path in _own_files():
        if path.stem == name:
            return _read_preset(path, is_own=True)
    raise UserError(f"there is no preset {name}", str(user_presets_dir()))


def save_preset(name: str, values: Mapping[str, object], *, description: str = "", overwrite: bool = True) -> Preset:
    """Keep `values`, by name of the form's field, as the user's own preset `name`.

    Values of None are left out. Raises `UserError` for a name or a value that cannot be used, and for a name that is taken
    when `overwrite` is False. Built-in presets are never replaced.
    """
    _check_name(name)
    path = _own_path(name)
    if not overwrite and path.exists():
        raise UserError(f"there is a preset {name} already", str(path), "Choose another name, or replace it.")
    tables = _tables_of(name, description, values)
    values_checked = _checked_values(tables, f"the preset {name}")
    user_presets_dir().mkdir(parents=True, exist_ok=True)
    write_atomic(path, _written(name, description, values))
    return Preset(name, name, description, "own", values_checked)


def _written(name: str, description: str, values: Mapping[str, object]) -> str:
    tables = _tables_of(name, description, values)
    return tomlkit.dumps({table: tables[table] for table in _TABLES if table in tables})


def _tables_of(name: str, description: str, values: Mapping[str, object]) -> dict[str, dict[str, object]]:
    tables: dict[str, dict[str, object]] = {"preset": {"title": name, "kind": "own"}}
    if description:
        tables["preset"]["description"] = description
    for key, value in values.items():
        if value is not None:
            tables.setdefault(_table_of(key), {})[key] = _toml_value(value)
    return tables


def delete_preset(name: str) -> Path:
    """Move one of the user's own presets to the bin. Gives the place where it lies now, for `restore_preset`.

    Raises `UserError` for a built-in one and when it is gone already.
    """
    _check_name(name)
    folder = bin_dir() / "presets"
    target = next(
        place for number in count() if not (place := folder / f"{name}{f'-{number}' * (number > 0)}.toml").exists()
    )
    try:
        if not _own_path(name).exists():
            raise FileNotFoundError
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(_own_path(name), target)
    except FileNotFoundError:
        raise UserError(f"there is no preset {name} any more", str(user_presets_dir())) from None
    return target


def restore_preset(place: Path, name: str) -> None:
    """Take a preset back from the bin. Raises `UserError` when it is gone or its name is taken again."""
    _check_name(name)
    if _own_path(name).exists():
        raise UserError(f"there is a preset {name} again", str(_own_path(name)), "Rename that one first.")
    try:
        user_presets_dir().mkdir(parents=True, exist_ok=True)
        shutil.move(place, _own_path(name))
    except OSError as error:
        raise UserError(f"the preset cannot be taken back ({error.strerror or error})", str(place)) from None


def rename_preset(name: str, new_name: str) -> None:
    """Raises `UserError` for a name that cannot be used or is taken, and when the preset is built in or gone."""
    _check_name(name)
    _check_name(new_name)
    if name == new_name:
        return
    target = _own_path(new_name)
    # On some systems the name in other letters is the same file.
    if target.exists() and name.casefold() != new_name.casefold():
        raise UserError(f"there is a preset {new_name} already", str(target), "Choose another name.")
    try:
        _own_path(name).rename(target)
    except FileNotFoundError:
        raise UserError(f"there is no preset {name} any more", str(user_presets_dir())) from None


def preset_text(preset: Preset) -> str:
    """The preset as a file that `import_preset` takes."""
    return _written(preset.name, preset.description, preset.values)


def import_preset(text: str, name: str, *, overwrite: bool = False) -> Preset:
    """Keep a preset's file that came from elsewhere, under `name`. An options file is taken too: all it holds are options.

    Raises `UserError` for what cannot be used, and for a name that is taken unless `overwrite`.
    """
    where = f"the preset {name}"
    try:
        parsed = cast("dict[str, object]", tomlkit.parse(text.lstrip("\ufeff")).unwrap())
    except TOMLKitError as error:
        raise UserError(f"this is no TOML file ({error})", where, exit_code=2) from None
    tables = {
        table: cast("dict[str, object]", content) for table, content in parsed.items() if isinstance(content, dict)
    }
    if not {"options", "form", "preset"} & set(tables):
        options = {key: value for key, value in parsed.items() if not isinstance(value, dict)}
        tables = {"options": {**options, **{key: value for table in tables.values() for key, value in table.items()}}}
    elif len(tables) < len(parsed):
        raise UserError("there are lines outside of a table", where, "Put options below [options].", exit_code=2)
    values = dict(_checked_values(tables, where))
    if "vram_gb" in tables.get("preset", {}):
        values["vram_gb"] = tables["preset"]["vram_gb"]
    description = str(tables.get("preset", {}).get("description", ""))
    return save_preset(name, values, description=description, overwrite=overwrite)


# ------------------------------------------------------------------------------------------------------------ names


def _check_name(name: str, *, is_own: bool = True) -> None:
    """A name is also a file's name, on every system, and never leads out of the folder."""
    problem: str | None = None
    if not name.strip():
        problem = "a preset needs a name"
    elif len(name) > MAX_NAME:
        problem = f"the name has {len(name)} characters; at most {MAX_NAME} are allowed"
    elif not re.fullmatch(r"\w[\w .,()+=@!-]*", name) or name[-1] in " ." or _RESERVED.fullmatch(name):
        problem = f"{name!r} cannot be a preset's name"
    elif is_own and name.casefold() in {path.stem.casefold() for path in BUILT_IN_DIR.glob("*.toml")}:
        problem = f"{name} is a built-in preset"
    if problem is not None:
        raise UserError(problem, hint="Use letters, digits, spaces, dots and dashes, and a name that is not built in.")


def _own_path(name: str) -> Path:
    return user_presets_dir() / f"{name}.toml"


def _own_files() -> list[Path]:
    return [path for path in user_presets_dir().glob("*.toml") if not path.name.startswith(".")]


def _table_of(key: str) -> str:
    if key in _DATASET_KEYS:
        return "dataset"
    if key == "vram_gb":
        return "preset"
    return "form" if key in _FORM_KEYS else "options"


def _toml_value(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_toml_value(item) for item in cast("list[object]", value)]
    return value


# ---------------------------------------------------------------------------------------------------------- reading


def _read_preset(path: Path, *, is_own: bool) -> Preset:
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        parsed = cast("dict[str, object]", tomlkit.parse(text).unwrap())
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise UserError(f"this preset cannot be read ({error})", where, exit_code=2) from None
    tables: dict[str, dict[str, object]] = {}
    for table, content in parsed.items():
        if not isinstance(content, dict):
            raise UserError(f"{table} stands outside of a table", where, "Put options below [options].", exit_code=2)
        tables[table] = cast("dict[str, object]", content)
    values = dict(_checked_values(tables, where))
    head = tables.get("preset", {})
    kind = head.get("kind", "own")
    # A built-in preset that somebody copied into the own folder is an own one.
    found: PresetKind | None = "own" if is_own else next((entry for entry in _BUILT_IN_KINDS if entry == kind), None)
    if found is None:
        raise UserError(f"kind is {kind!r}; it must be one of {', '.join(_BUILT_IN_KINDS)}", where, exit_code=2)
    if "vram_gb" in head:
        values["vram_gb"] = head["vram_gb"]
    order = head.get("order", 0)
    return Preset(
        name=path.stem,
        title=path.stem if is_own else str(head.get("title") or path.stem),
        description=str(head.get("description", "")),
        kind=found,
        values=MappingProxyType(values),
        order=order if isinstance(order, int) else 0,
    )


def _checked_values(tables: Mapping[str, Mapping[str, object]], where: str) -> Mapping[str, object]:
    """The values of a preset by field name. Raises `UserError` (exit code 2) with everything that is wrong."""
    problems: list[Problem] = []
    for table, known in (("preset", _HEAD_KEYS), ("dataset", _DATASET_KEYS), ("form", _FORM_KEYS)):
        problems += [_unknown(key, known, f"{where}, [{table}]") for key in tables.get(table, {}) if key not in known]
    problems += [_unknown(table, _TABLES, where) for table in tables if table not in _TABLES]
    dataset, form = tables.get("dataset", {}), tables.get("form", {})
    repeats = dataset.get("num_repeats")
    if repeats is not None and (type(repeats) is not int or repeats < 1):
        what = f"num_repeats is {repeats!r}; it must be a whole number, 1 or more"
        problems.append(Problem(what, f"{where}, [dataset]", field="num_repeats"))
    vram = tables.get("preset", {}).get("vram_gb")
    if vram is not None and (isinstance(vram, bool) or not isinstance(vram, (int, float)) or vram <= 0):
        problems.append(Problem(f"vram_gb is {vram!r}; it must be a number above 0", f"{where}, [preset]"))
    for key, value in form.items():
        if key in _FORM_KEYS and not isinstance(value, str):
            problems.append(Problem(f"{key} is {value!r}; it must be text", f"{where}, [form]", field=key))
    options = tables.get("options", {})
    problems += _option_problems(options, where)
    if problems:
        raise UserError.many(problems, exit_code=2)
    return MappingProxyType({**options, **dataset, **form})


def _unknown(key: str, known: tuple[str, ...], where: str) -> Problem:
    near = nearest(key, known)
    return Problem(f"{key} is not known here", where, f"Did you mean {near}?" if near else None)


def _option_problems(options: Mapping[str, object], where: str) -> list[Problem]:
    """What is wrong with the options that the preset names; what it leaves open is not its business."""
    try:
        validate_options(options, where=f"{where}, [options]")
    except UserError as error:
        return [problem for problem in error.problems if problem.field is None or problem.field in options]
    return []
