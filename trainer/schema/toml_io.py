"""Options and dataset files: TOML (or JSON) to checked values, and back."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from trainer.schema.base import Problem, UserError, nearest
from trainer.schema.file_checks import missing_folder, no_dataset
from trainer.schema.option_table import NOT_SUPPORTED
from trainer.schema.options import GROUPS, Options, refusal, shown
from trainer.schema.options_data import SIZE_STEP, parse_resolution

logger = logging.getLogger("trainer")

_EXIT_OPTIONS: Final = 2
_EXIT_FIXABLE: Final = 3

# ----------------------------------------------------------------------------------------------------- options files


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
    """An options file that gives exactly these options; only what is not at its default is written."""
    document = tomlkit.document()
    values = non_default_values(options)
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
    if path.suffix != ".toml":
        path = path.parent / f"{path.name}.toml"
    parsed = _read_table(path, "options file", "config_file")
    top: dict[str, object] = {}
    sections: list[tuple[str, dict[str, object]]] = []
    for name, value in parsed.items():
        if isinstance(value, dict):
            sections.append((name, cast("dict[str, object]", value)))
        else:
            top[name] = value
    return [("", top), *sections]


def _read_table(path: Path, noun: str, field: str) -> dict[str, object]:
    where = str(path)
    is_json = path.suffix.lower() == ".json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        what, hint = f"this {noun} does not exist", f"Check --{field} for a typing error."
        raise UserError(what, where, hint, field=field, exit_code=_EXIT_OPTIONS) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        what = f"this {noun} cannot be read ({reason})"
        raise UserError(what, where, f"It is given as --{field}.", field=field, exit_code=_EXIT_OPTIONS) from None
    try:
        parsed = cast("object", json.loads(text) if is_json else tomlkit.parse(text).unwrap())
    except (TOMLKitError, ValueError, RecursionError) as error:
        what = f"this {noun} is not valid {'JSON' if is_json else 'TOML'}: {error}"
        hint = None if is_json else "Texts stand in \"double quotes\", Windows paths in 'single quotes'."
        raise UserError(what, where, hint, field=field, exit_code=_EXIT_OPTIONS) from None
    if not isinstance(parsed, dict):
        raise UserError(f"this {noun} holds no table", where, field=field, exit_code=_EXIT_OPTIONS)
    return cast("dict[str, object]", parsed)


# ----------------------------------------------------------------------------------------------------- dataset files


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of pictures. `class_tokens` is the caption of pictures without one; `resize_interpolation` None means
    area to shrink and lanczos to enlarge."""

    image_dir: Path
    num_repeats: int
    caption_extension: str
    class_tokens: str | None
    is_reg: bool
    shuffle_caption: bool
    keep_tokens: int
    keep_tokens_separator: str
    caption_separator: str
    secondary_separator: str | None
    enable_wildcard: bool
    caption_prefix: str | None
    caption_suffix: str | None
    caption_dropout_rate: float
    caption_dropout_every_n_epochs: int
    caption_tag_dropout_rate: float
    token_warmup_min: int
    token_warmup_step: float
    flip_aug: bool
    random_crop: bool
    resize_interpolation: str | None


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that are trained at one resolution (width, height), in pixels, and one batch size."""

    resolution: tuple[int, int]
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    subsets: tuple[SubsetSpec, ...]


@dataclass(frozen=True)
class DatasetConfig:
    """Everything that training draws pictures from."""

    datasets: tuple[DatasetSpec, ...]


Level = Literal["general", "dataset", "subset"]
_TITLES: Final[Mapping[Level, str]] = MappingProxyType(
    {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
)
RESIZE_CHOICES: Final = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError('must be text in "quotes"')
    return value


def _filled_text(value: object) -> str:
    text = _text(value)
    if not text:
        raise ValueError("must be at least one character")
    return text


def _text_or_none(value: object) -> str | None:
    return _text(value) or None


def _ending(value: object) -> str:
    text = _filled_text(value)
    return text if text.startswith(".") else f".{text}"


def _whole(lowest: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if type(value) is not int or value < lowest:
            raise ValueError(f"must be a whole number, {lowest} or more")
        return value

    return read


def _part(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError("must be a number, 0 to 1")
    return float(value)


def _steps(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("must be a number, 0 or more")
    return float(value)


def _side_steps(value: object) -> int:
    if type(value) is not int or value < SIZE_STEP or value % SIZE_STEP:
        raise ValueError(f"must be a multiple of {SIZE_STEP}")
    return value


def _resizing(value: object) -> str:
    if value not in RESIZE_CHOICES:
        raise ValueError(f"must be one of {', '.join(RESIZE_CHOICES)}")
    return cast("str", value)


def _folder(value: object) -> Path:
    return Path(_filled_text(value))


@dataclass(frozen=True)
class _Key:
    """A key of a dataset file: the tables that it may stand in, how it is read, and the option below the file."""

    levels: tuple[Level, ...]
    read: Callable[[object], object]
    option: str | None = None
    default: object = None


_UPPER: Final[tuple[Level, ...]] = ("general", "dataset")
_ALL: Final[tuple[Level, ...]] = (*_UPPER, "subset")
_DATASET_KEYS: Final[Mapping[str, _Key]] = MappingProxyType(
    {
        "resolution": _Key(_UPPER, parse_resolution, "resolution"),
        "batch_size": _Key(_UPPER, _whole(1), "train_batch_size"),
        "enable_bucket": _Key(_UPPER, _switch, "enable_bucket"),
        "min_bucket_reso": _Key(_UPPER, _whole(SIZE_STEP), "min_bucket_reso"),
        "max_bucket_reso": _Key(_UPPER, _whole(SIZE_STEP), "max_bucket_reso"),
        "bucket_reso_steps": _Key(_UPPER, _side_steps, "bucket_reso_steps"),
        "bucket_no_upscale": _Key(_UPPER, _switch, "bucket_no_upscale"),
    }
)
_SUBSET_KEYS: Final[Mapping[str, _Key]] = MappingProxyType(
    {
        "image_dir": _Key(("subset",), _folder),
        "num_repeats": _Key(_ALL, _whole(0), "dataset_repeats"),
        "caption_extension": _Key(_ALL, _ending, "caption_extension"),
        "class_tokens": _Key(_ALL, _text),
        "is_reg": _Key(("subset",), _switch, default=False),
        "shuffle_caption": _Key(_ALL, _switch, "shuffle_caption"),
        "keep_tokens": _Key(_ALL, _whole(0), "keep_tokens"),
        "keep_tokens_separator": _Key(_ALL, _text, "keep_tokens_separator"),
        "caption_separator": _Key(_ALL, _filled_text, "caption_separator"),
        "secondary_separator": _Key(_ALL, _text_or_none, "secondary_separator"),
        "enable_wildcard": _Key(_ALL, _switch, "enable_wildcard"),
        "caption_prefix": _Key(_ALL, _text, "caption_prefix"),
        "caption_suffix": _Key(_ALL, _text, "caption_suffix"),
        "caption_dropout_rate": _Key(_ALL, _part, "caption_dropout_rate"),
        "caption_dropout_every_n_epochs": _Key(_ALL, _whole(0), "caption_dropout_every_n_epochs"),
        "caption_tag_dropout_rate": _Key(_ALL, _part, "caption_tag_dropout_rate"),
        "token_warmup_min": _Key(_ALL, _whole(0), "token_warmup_min"),
        "token_warmup_step": _Key(_ALL, _steps, "token_warmup_step"),
        "flip_aug": _Key(_ALL, _switch, "flip_aug"),
        "random_crop": _Key(_ALL, _switch, "random_crop"),
        "resize_interpolation": _Key(_ALL, _resizing, "resize_interpolation"),
    }
)
_KEYS: Final[Mapping[str, _Key]] = MappingProxyType({**_DATASET_KEYS, **_SUBSET_KEYS})

_REFUSED_KEYS: Final[Mapping[str, tuple[object, str]]] = MappingProxyType(
    {
        **{
            name: (NOT_SUPPORTED[name].default, NOT_SUPPORTED[name].reason)
            for name in (
                "color_aug",
                "face_crop_aug_range",
                "cache_info",
                "alpha_mask",
                "validation_split",
                "validation_seed",
            )
        },
        "network_multiplier": (1.0, "it has no effect, in sd-scripts either; leave it out"),
        "custom_attributes": ({}, "it is not supported yet; leave it out"),
        "metadata_file": (None, NOT_SUPPORTED["in_json"].reason),
        "conditioning_data_dir": (None, NOT_SUPPORTED["masked_loss"].reason),
    }
)
"""Keys of the reference's dataset files that are not carried out: the value that changes nothing, and the reason."""

_RENAMED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "train_batch_size": "batch_size",
        "dataset_repeats": "num_repeats",
        "caption_extention": "caption_extension",
        "train_data_dir": "image_dir",
    }
)
"""Names that are options, and what they are called in a dataset file."""


def dataset_config(options: Options) -> DatasetConfig:
    """The pictures that the options name: the dataset file, else the folders.

    Raises `UserError`: exit code 2 for what the options and a dataset file say, 3 for folders.
    """
    missing = no_dataset(options)
    if missing is not None:
        raise UserError.many([missing], exit_code=_EXIT_OPTIONS)
    if options.dataset_config is not None:
        return read_dataset_config(options.dataset_config, options)
    return dataset_config_from_folders(options)


def read_dataset_config(path: Path, options: Options) -> DatasetConfig:
    """A dataset file, `.toml` or `.json`. Each value is looked up in the subset, its dataset, `[general]`, the options.

    Raises one `UserError` (exit code 2) with everything that is wrong. Folders are not looked at; relative ones are
    relative to the current folder. A subset with `num_repeats` 0 is left out with a warning.
    """
    if path.suffix.lower() not in (".toml", ".json"):
        what, hint = "this is no dataset file by its name", "It must end in .toml or .json."
        raise UserError(what, str(path), hint, field="dataset_config", exit_code=_EXIT_OPTIONS)
    return _DatasetReader(str(path), options).read(_read_table(path, "dataset file", "dataset_config"))


class _DatasetReader:
    """One pass over a dataset file that collects problems."""

    def __init__(self, where: str, options: Options) -> None:
        self._where = where
        self._options = options
        self._problems: list[Problem] = []

    def read(self, parsed: Mapping[str, object]) -> DatasetConfig:
        for name in parsed:
            if name not in ("general", "datasets"):
                self._misplaced(name, None, "")
        general = self._table(parsed.get("general", {}), "[general]", "general")
        tables = self._tables(parsed.get("datasets"), "datasets", "", "[[datasets]]")
        datasets = [
            self._dataset(table, general, f"[[datasets]] {number}") for number, table in enumerate(tables, start=1)
        ]
        if self._problems:
            raise UserError.many(self._problems, exit_code=_EXIT_OPTIONS)
        return DatasetConfig(tuple(dataset for dataset in datasets if dataset is not None))

    def _complain(self, what: str, place: str, hint: str | None = None) -> None:
        where = f"{self._where}, {place}" if place else self._where
        self._problems.append(Problem(what, where, hint, "dataset_config"))

    def _tables(self, value: object, name: str, place: str, title: str) -> list[dict[str, object]]:
        """The tables of an array that must hold some."""
        if value is None or value == []:
            self._complain(f"there is no {title}", place, "Add one.")
            return []
        entries = cast("list[object]", value) if isinstance(value, list) else [None]
        tables = [cast("dict[str, object]", entry) for entry in entries if isinstance(entry, dict)]
        if len(tables) != len(entries):
            self._complain(f"{name} must be a list of tables", place, f"Write {title}, with two brackets.")
        return tables

    def _table(self, value: object, place: str, level: Level) -> dict[str, object]:
        """The values of one table as their types, without those that are wrong."""
        if not isinstance(value, dict):
            self._complain(f"{level} must be a table", place, f"Write {_TITLES[level]}.")
            return {}
        values: dict[str, object] = {}
        for name, raw in cast("dict[str, object]", value).items():
            key = _KEYS.get(name)
            if raw is None or (name == "subsets" and level == "dataset"):
                continue  # A null, which only JSON has, is an absent value.
            if name in _REFUSED_KEYS:
                neutral, reason = _REFUSED_KEYS[name]
                if raw != neutral:
                    self._complain(*refusal(name, reason, place))
            elif key is None or level not in key.levels:
                self._misplaced(name, level, place)
            else:
                try:
                    values[name] = key.read(raw)
                except ValueError as error:
                    self._complain(f"{name} is {shown(raw)}; it {error}", place)
        return values

    def _misplaced(self, name: str, level: Level | None, place: str) -> None:
        """An unknown key, or one that belongs to another table."""
        key = _KEYS.get(name)
        if key is not None:
            titles = " or ".join(_TITLES[each] for each in key.levels)
            self._complain(f"{name} cannot stand here", place, f"It belongs to {titles}.")
            return
        known = ["general", "datasets"]
        if level is not None:
            known = [each for each, entry in _KEYS.items() if level in entry.levels]
            known += ["subsets"] if level == "dataset" else []
        near = _RENAMED.get(name) or nearest(name, known) or nearest(name, _KEYS)
        self._complain(f"{name} is not a known key", place, f"Did you mean {near}?" if near else None)

    def _dataset(self, table: dict[str, object], general: Mapping[str, object], place: str) -> DatasetSpec | None:
        num_problems = len(self._problems)
        values = self._table(table, place, "dataset")
        entries = self._tables(table.get("subsets"), "subsets", place, _TITLES["subset"])
        subsets = [
            subset
            for number, entry in enumerate(entries, start=1)
            if (subset := self._subset(entry, values, general, f"{place}, subset {number}")) is not None
        ]
        found = {name: self._value(name, values, general) for name in _DATASET_KEYS}
        if found["resolution"] is None and "resolution" not in table and len(self._problems) == num_problems:
            self._complain("there is no resolution", place, "Add resolution = 512, or give --resolution.")
        shortest, longest = cast("int", found["min_bucket_reso"]), cast("int", found["max_bucket_reso"])
        if found["enable_bucket"] and shortest > longest:
            what = f"min_bucket_reso {shortest} is above max_bucket_reso {longest}"
            self._complain(what, place, "Lower the one or raise the other.")
        if len(self._problems) > num_problems or found["resolution"] is None:
            return None
        if not subsets:
            self._complain("no subset is left: each has num_repeats 0", place)
            return None
        return DatasetSpec(**cast("dict[str, Any]", found), subsets=tuple(subsets))

    def _subset(
        self, entry: dict[str, object], dataset: Mapping[str, object], general: Mapping[str, object], place: str
    ) -> SubsetSpec | None:
        own = self._table(entry, place, "subset")
        if "image_dir" not in entry and "metadata_file" not in entry:
            self._complain("there is no image_dir", place, "Give the folder of pictures.")
        found = {name: self._value(name, own, dataset, general) for name in _SUBSET_KEYS}
        for what in _cache_conflicts(found, self._options):
            self._complain(what, place, "Turn one of the two off.")
        if found["num_repeats"] == 0:
            logger.warning("%s, %s is left out: its num_repeats is 0", self._where, place)
            return None
        if found["image_dir"] is None:
            return None
        return SubsetSpec(**cast("dict[str, Any]", found))

    def _value(self, name: str, *tables: Mapping[str, object]) -> object:
        """The first value among the tables, else the option's, else the default."""
        for table in tables:
            if name in table:
                return table[name]
        return _fallback(name, self._options)


def _fallback(name: str, options: Options) -> object:
    """The value of a key that no table has."""
    key = _KEYS[name]
    if key.option is None:
        return key.default
    value = cast("object", getattr(options, key.option))
    return parse_resolution(value) if name == "resolution" and value is not None else value


def _cache_conflicts(subset: Mapping[str, object], options: Options) -> Iterator[str]:
    """What a subset asks for that the caches rule out."""
    if options.cache_latents and subset["random_crop"]:
        yield "random_crop cuts pictures anew in every step, which cache_latents rules out"


# ------------------------------------------------------------------------------------------------------------ folders


def dataset_config_from_folders(options: Options) -> DatasetConfig:
    """One dataset from `train_data_dir` and `reg_data_dir`: each folder `N_words` in them is a subset with N repeats.

    The words are the caption of pictures without one. Other folders, and those with 0 repeats, are left out with a
    warning. Raises `UserError`: exit code 3 for folders, 2 for a missing resolution.
    """
    subsets: list[SubsetSpec] = []
    problems: list[Problem] = []
    for field, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        folder: Path | None = getattr(options, field)
        if folder is None:
            continue
        try:
            children = sorted(child for child in folder.iterdir() if child.is_dir())
        except (OSError, ValueError):
            problems.append(missing_folder(folder, field))
            continue
        found = [spec for child in children if (spec := _folder_subset(child, is_reg, options)) is not None]
        if not found:
            hint = "Put the pictures into a folder whose name is repeats, _ and words, such as 10_mycat."
            problems.append(Problem("there is no folder named like 10_mycat in here", str(folder), hint, field))
        subsets += found
    values = {name: _fallback(name, options) for name in _DATASET_KEYS}
    exit_code = _EXIT_FIXABLE
    if values["resolution"] is None:
        problems.append(Problem("resolution is not given", "--resolution", "512 is usual.", "resolution"))
        exit_code = _EXIT_OPTIONS
    if problems:
        raise UserError.many(problems, exit_code=exit_code)
    return DatasetConfig((DatasetSpec(**cast("dict[str, Any]", values), subsets=tuple(subsets)),))


def _folder_subset(folder: Path, is_reg: bool, options: Options) -> SubsetSpec | None:
    repeats, separator, words = folder.name.partition("_")
    if not separator or not repeats.isascii() or not repeats.isdigit() or int(repeats) < 1:
        logger.warning("%s is left out: its name is not repeats, _ and words, such as 10_mycat", folder)
        return None
    values = {name: _fallback(name, options) for name in _SUBSET_KEYS}
    values |= {"image_dir": folder, "num_repeats": int(repeats), "class_tokens": words or None, "is_reg": is_reg}
    return SubsetSpec(**cast("dict[str, Any]", values))


# ------------------------------------------------------------------------------------------------------------ writing


def dataset_to_toml(values: Mapping[str, object]) -> str:
    """A dataset file from `{"general": {...}, "datasets": [{..., "subsets": [{...}]}]}`; None values are left out."""
    document = tomlkit.document()
    for name, value in values.items():
        written = _written(value)
        if written not in ({}, []):
            document.add(name, tomlkit.item(cast("dict[str, object]", written)))
    return tomlkit.dumps(document)


def _written(value: object) -> object:
    """A value as TOML has it, without what is None."""
    if isinstance(value, Mapping):
        table = cast("Mapping[str, object]", value)
        return {name: _written(entry) for name, entry in table.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_written(entry) for entry in cast("Sequence[object]", value)]
    return str(value) if isinstance(value, Path) else value
