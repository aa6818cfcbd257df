"""Dataset files and folders: TOML (or JSON) to checked datasets, and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import tomlkit

from trainer.schema.base import Problem, UserError, nearest, shown
from trainer.schema.dataset_keys import (
    DATASET_KEYS,
    KEYS,
    NOT_WITH_METADATA,
    REFUSED_KEYS,
    RENAMED,
    SUBSET_KEYS,
    TITLES,
    DatasetConfig,
    DatasetSpec,
    Level,
    SubsetSpec,
)
from trainer.schema.file_checks import missing_folder, no_dataset
from trainer.schema.option_status import refusal
from trainer.schema.options import Options
from trainer.schema.options_data import CHANGES_PIXELS
from trainer.schema.toml_table import read_table

logger = logging.getLogger("trainer")

_EXIT_OPTIONS: Final = 2
_PICTURE_ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
_EXIT_FIXABLE: Final = 3


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
    return _DatasetReader(str(path), options).read(read_table(path, "dataset file", "dataset_config"))


class _DatasetReader:
    """One pass over a dataset file that collects problems."""

    def __init__(self, where: str, options: Options) -> None:
        self._where = where
        self._options = options
        self._problems: list[Problem] = []
        self._fallbacks: set[str] = set()
        """Keys that were left to the options somewhere."""

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
        made = tuple(dataset for dataset in datasets if dataset is not None)
        return DatasetConfig(made, overridden=tuple(self._overridden(made)))

    def _overridden(self, datasets: Sequence[DatasetSpec]) -> Iterator[str]:
        """Options with a value of their own that no dataset or subset takes, as the file has another one everywhere."""
        for name, key in KEYS.items():
            if key.option is None or name in self._fallbacks:
                continue
            if getattr(self._options, key.option) == Options.model_fields[key.option].get_default():
                continue
            subsets = [subset for dataset in datasets for subset in dataset.subsets]
            specs = datasets if name in DATASET_KEYS else subsets
            if any(getattr(spec, name) != _fallback(name, self._options) for spec in specs):
                yield key.option

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
            self._complain(f"{level} must be a table", place, f"Write {TITLES[level]}.")
            return {}
        values: dict[str, object] = {}
        for name, raw in cast("dict[str, object]", value).items():
            key = KEYS.get(name)
            if raw is None or (name == "subsets" and level == "dataset"):
                continue  # A null, which only JSON has, is an absent value.
            if name in REFUSED_KEYS:
                neutral, reason = REFUSED_KEYS[name]
                if raw != neutral:
                    self._complain(*refusal(name, reason, place))
            elif key is None or level not in key.levels:
                self._misplaced(name, level, place)
            else:
                try:
                    values[name] = key.read(raw)
                except ValueError as error:
                    # Without its quotes such a text would be taken for what is asked for.
                    is_quoted = isinstance(raw, str) and (raw.lower() in ("true", "false") or _is_number(raw))
                    value = f'"{raw}"' if is_quoted else shown(raw)
                    self._complain(
                        f"{name} is {value}; it {error}", place, "Leave the quotes out." if is_quoted else None
                    )
        return values

    def _misplaced(self, name: str, level: Level | None, place: str) -> None:
        """An unknown key, or one that belongs to another table."""
        key = KEYS.get(name)
        if key is not None:
            titles = " or ".join(TITLES[each] for each in key.levels)
            self._complain(f"{name} cannot stand here", place, f"It belongs to {titles}.")
            return
        known = ["general", "datasets"]
        if level is not None:
            known = [each for each, entry in KEYS.items() if level in entry.levels]
            known += ["subsets"] if level == "dataset" else []
        near = RENAMED.get(name) or nearest(name, known) or nearest(name, KEYS)
        self._complain(f"{name} is not a known key", place, f"Did you mean {near}?" if near else None)

    def _dataset(self, table: dict[str, object], general: Mapping[str, object], place: str) -> DatasetSpec | None:
        num_problems = len(self._problems)
        values = self._table(table, place, "dataset")
        entries = self._tables(table.get("subsets"), "subsets", place, TITLES["subset"])
        subsets = [
            subset
            for number, entry in enumerate(entries, start=1)
            if (subset := self._subset(entry, values, general, f"{place}, subset {number}")) is not None
        ]
        found = {name: self._value(name, values, general) for name in DATASET_KEYS}
        if found["resolution"] is None and "resolution" not in table and len(self._problems) == num_problems:
            self._complain("there is no resolution", place, "Add resolution = 512, or give --resolution.")
        shortest, longest = cast("int", found["min_bucket_reso"]), cast("int", found["max_bucket_reso"])
        if found["enable_bucket"] and shortest > longest:
            what = f"min_bucket_reso {shortest} is above max_bucket_reso {longest}"
            self._complain(what, place, "Lower the one or raise the other.")
        if len({subset.metadata_file is None for subset in subsets}) > 1:
            what = "some subsets of this dataset have a metadata_file and some have not"
            self._complain(what, place, "Put those with one into a [[datasets]] of their own.")
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
        if entry.get("image_dir") is None and entry.get("metadata_file") is None:
            self._complain("there is no image_dir", place, "Give the folder of pictures.")
        found = {name: self._value(name, own, dataset, general) for name in SUBSET_KEYS}
        for what in _cache_conflicts(found, self._options):
            self._complain(what, place, "Turn one of the two off.")
        if found["metadata_file"] is not None:
            for name in (name for name in NOT_WITH_METADATA if name in own):
                self._complain(f"{name} cannot stand beside metadata_file", place, "Captions come from that file.")
        if found["conditioning_data_dir"] is not None and not self._options.masked_loss:
            self._complain("conditioning_data_dir needs the option masked_loss", place, "Add --masked_loss.")
        if found["num_repeats"] == 0:
            logger.warning("%s, %s is left out: its num_repeats is 0", self._where, place)
            return None
        if found["image_dir"] is None and found["metadata_file"] is None:
            return None
        return SubsetSpec(**cast("dict[str, Any]", found))

    def _value(self, name: str, *tables: Mapping[str, object]) -> object:
        """The first value among the tables, else the option's, else the default."""
        for table in tables:
            if name in table:
                return table[name]
        self._fallbacks.add(name)
        return _fallback(name, self._options)


def _is_number(value: object) -> bool:
    """Whether a text is a number."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _fallback(name: str, options: Options) -> object:
    """The value of a key that no table has."""
    key = KEYS[name]
    if key.option is None:
        return key.default
    value = cast("object", getattr(options, key.option))
    return key.read(value) if key.reads_option and value is not None else value


def _cache_conflicts(subset: Mapping[str, object], options: Options) -> Iterator[str]:
    """What a subset asks for that the caches rule out."""
    for name, effect in CHANGES_PIXELS.items():
        if options.cache_latents and subset[name]:
            yield f"{name} {effect} in every step, which cache_latents rules out"


# ------------------------------------------------------------------------------------------------------------ folders


def dataset_config_from_folders(options: Options) -> DatasetConfig:
    """One dataset from `train_data_dir` and `reg_data_dir`: each folder `N_words` in them is a subset with N repeats.

    The words are the caption of pictures without one. Other folders, and those with 0 repeats, are left out with a
    warning. With `in_json`, that metadata file is the one subset and `train_data_dir` the folder of its pictures. Raises
    `UserError`: exit code 3 for folders, 2 for a missing resolution.
    """
    subsets: list[SubsetSpec] = []
    problems: list[Problem] = []
    kinds = (("train_data_dir", False), ("reg_data_dir", True))
    if options.in_json is not None:
        subsets.append(_subset_from_options(options, image_dir=options.train_data_dir, metadata_file=options.in_json))
        kinds = ()
    for field, is_reg in kinds:
        folder: Path | None = getattr(options, field)
        if folder is None:
            continue
        try:
            entries = sorted(folder.iterdir())
        except (OSError, ValueError):
            problems.append(missing_folder(folder, field))
            continue
        children = [child for child in entries if child.is_dir() and not child.name.startswith(".")]
        loose = [path.name for path in entries if path.suffix.lower() in _PICTURE_ENDINGS]
        if loose and children:
            logger.warning("%s: pictures beside the folders are not used: %s, ...", folder, loose[0])
        found = [spec for child in children if (spec := _folder_subset(child, is_reg, options)) is not None]
        if not found:
            hint = "Put the pictures into a folder whose name is repeats, _ and words, such as 10_mycat."
            problems.append(Problem("there is no folder named like 10_mycat in here", str(folder), hint, field))
        subsets += found
    values = {name: _fallback(name, options) for name in DATASET_KEYS}
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
    return _subset_from_options(
        options, image_dir=folder, num_repeats=int(repeats), class_tokens=words or None, is_reg=is_reg
    )


def _subset_from_options(options: Options, **known: object) -> SubsetSpec:
    """A subset of which no file says more than `known`."""
    values = {name: _fallback(name, options) for name in SUBSET_KEYS}
    return SubsetSpec(**cast("dict[str, Any]", {**values, **known}))


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
