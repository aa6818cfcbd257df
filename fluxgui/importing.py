"""An imported project on the page: what the form shows of it, and the job that trains exactly it. No gradio."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import tomlkit

from fluxgui.fields import DATASET_NAMES, make_fields
from fluxgui.form import Job
from fluxgui.language import say
from fluxgui.pictures import CAPTION_SUFFIX, PictureFolder, check_folder
from trainer.schema.base import Problem, UserError
from trainer.schema.cli import check_files
from trainer.schema.dataset_file import dataset_to_toml, read_dataset_config
from trainer.schema.dataset_keys import KEYS
from trainer.schema.file_checks import missing_folder
from trainer.schema.import_project import MAX_BYTES, ImportedProject, import_project
from trainer.schema.option_files import options_to_toml
from trainer.schema.options import Options
from trainer.schema.settings import is_allowed

# The run's folder has these; an exported command has them as they were given.
KEPT_FOR_EXPORT: Final = ("dataset_config", "sample_prompts", "output_dir")
_FOLDERS: Final = ("train_data_dir", "reg_data_dir", "in_json")
_limits: list[bool] = []
_PATHS: Final = ("image_dir", "conditioning_data_dir", "metadata_file")
_REPEATS: Final = re.compile(r"(?P<repeats>\d+)_(?P<words>.+)")
_OPTION_OF_KEY: Final[Mapping[str, str]] = {key: name for name, key in DATASET_NAMES.items()}


@dataclass(frozen=True)
class FormFilling:
    """Values by field name, and one line for each thing that the form has no place for."""

    values: Mapping[str, object]
    left_out: tuple[str, ...]


def read_pasted(text: str | None, files: str | None) -> ImportedProject:
    """The project, with the files that it names read from this machine. Raises `UserError`."""
    return import_project(text or "", files or "", read_file=_read)


def read_only_allowed() -> None:
    """From now on only files in the allowed folders are read: the page answers other machines."""
    _limits[:] = [True]


def _read(path: Path) -> str:
    if _limits and not is_allowed(path):
        raise ValueError(say("presets.not_allowed"))
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(say("presets.file_too_long"))
    return path.read_text(encoding="utf-8-sig")


def fill_form(project: ImportedProject) -> FormFilling:
    """The form's values for a project: options at their fields, the rest as lines of more options."""
    fields = make_fields()
    left_out: list[str] = []
    values: dict[str, object] = {name: field.default for name, field in fields.items()}
    more: dict[str, object] = {}
    for name, value in project.values.items():
        if name == "output_dir":
            left_out.append(say("presets.output_dir", value=value))
        elif (
            name in KEPT_FOR_EXPORT or name in _FOLDERS or (name == "network_module" and value == "networks.lora_flux")
        ):
            continue
        elif name in fields:
            values[name] = _shown(value)
        else:
            more[name] = _plain(value)
    if project.prompts is not None:
        values["sample_prompt_lines"] = project.prompts
    _fill_pictures(project, values, more, left_out)
    if "more_options" in fields:
        values["more_options"] = tomlkit.dumps(more).strip() if more else ""
    else:
        left_out += [say("presets.no_field", name=name) for name in more]
    return FormFilling(values, tuple(left_out))


def _shown(value: object) -> object:
    """A list in a text box as its words."""
    if isinstance(value, tuple):
        return " ".join(str(item) for item in cast("tuple[object, ...]", value))
    return value


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in cast("tuple[object, ...]", value)] if isinstance(value, tuple) else value


def _fill_pictures(
    project: ImportedProject, values: dict[str, object], more: dict[str, object], left_out: list[str]
) -> None:
    general = _table(project.dataset, "general")
    datasets = _tables(project.dataset, "datasets")
    if datasets:
        subsets = _tables(datasets[0], "subsets")
        if len(datasets) > 1 or len(subsets) > 1:
            number = sum(len(_tables(dataset, "subsets")) for dataset in datasets) - 1
            left_out.append(say("presets.more_subsets", number=number))
        subset = subsets[0] if subsets else {}
        dataset = {key: value for key, value in datasets[0].items() if key != "subsets"}
        for key, value in {**general, **dataset, **subset}.items():
            _fill_key(key, value, values, more, left_out)
        _prefix_as_trigger(values, more)
    elif project.options.train_data_dir is not None and project.options.in_json is None:
        _fill_from_folders(project, values, left_out)
    for name in ("reg_data_dir", "in_json"):
        if getattr(project.options, name) is not None:
            left_out.append(say("presets.no_field", name=name))


def _fill_key(key: str, value: object, values: dict[str, object], more: dict[str, object], left_out: list[str]) -> None:
    if key == "resolution":
        pair = cast("list[object]", value) if isinstance(value, list) else [value]
        values["resolution"] = ",".join(str(side) for side in pair)
    elif key in ("image_dir", "num_repeats"):
        values[key] = value
    elif key == "class_tokens":
        _fill_trigger(str(value), values, left_out)
    elif key == "caption_extension" and value == CAPTION_SUFFIX:
        return
    else:
        name = _OPTION_OF_KEY.get(key) or (KEYS[key].option if key in KEYS else None)
        if name is None or key == "caption_extension":
            left_out.append(say("presets.no_key", key=key, value=value))
        elif name in make_fields():
            values[name] = value
        else:
            more[name] = value


def _fill_trigger(words: str, values: dict[str, object], left_out: list[str]) -> None:
    """Class tokens stand for missing captions only; as a trigger word they would go before every caption too."""
    folder = _folder(values.get("image_dir"))
    if folder is not None and len(folder.without_caption) == len(folder.images):
        values["trigger_word"] = words
    else:
        left_out.append(say("presets.class_tokens", words=words))


def _prefix_as_trigger(values: dict[str, object], more: dict[str, object]) -> None:
    """What goes before every caption is the form's trigger word, where the form would write it the same."""
    words = more.get("caption_prefix")
    folder = _folder(values.get("image_dir"))
    has_captions = folder is not None and len(folder.without_caption) < len(folder.images)
    if has_captions and isinstance(words, str) and words and words == words.strip() and not values["trigger_word"]:
        values["trigger_word"] = more.pop("caption_prefix")


def _folder(path: object) -> PictureFolder | None:
    if not path:
        return None
    found = check_folder(Path(str(path)))
    return None if isinstance(found, Problem) else found


def _fill_from_folders(project: ImportedProject, values: dict[str, object], left_out: list[str]) -> None:
    parent = cast("Path", project.options.train_data_dir)
    try:
        named = [child for child in sorted(parent.iterdir()) if child.is_dir() and _REPEATS.fullmatch(child.name)]
    except OSError:
        left_out.append(say("presets.no_folder", path=parent))
        return
    if not named:
        left_out.append(say("presets.no_folder", path=parent))
        return
    if len(named) > 1:
        left_out.append(say("presets.more_subsets", number=len(named) - 1))
    match = _REPEATS.fullmatch(named[0].name)
    assert match is not None
    values |= {"image_dir": str(named[0]), "num_repeats": int(match["repeats"])}
    _fill_trigger(match["words"], values, left_out)


def _table(value: Mapping[str, object] | None, name: str) -> dict[str, object]:
    found = (value or {}).get(name)
    return cast("dict[str, object]", found) if isinstance(found, dict) else {}


def _tables(value: Mapping[str, object] | None, name: str) -> list[dict[str, object]]:
    found = (value or {}).get(name)
    entries = cast("list[object]", found) if isinstance(found, list) else []
    return [cast("dict[str, object]", entry) for entry in entries if isinstance(entry, dict)]


def dataset_text(project: ImportedProject) -> str:
    return dataset_to_toml(project.dataset) if project.dataset is not None else ""


def as_job(project: ImportedProject) -> Job:
    """The job that trains exactly this project. Raises `UserError` with everything that keeps it from that."""
    options = project.options
    problems = [*project.problems]
    own = {"output_dir"}  # the run's folder is taken
    own |= {"sample_prompts"} if project.prompts is not None else set()
    own |= {"dataset_config"} if project.dataset is not None else set()
    problems += [problem for problem in check_files(options) if problem.field not in own]
    dataset = _absolute(project.dataset) if project.dataset is not None else None
    problems += _dataset_problems(dataset, options) if dataset is not None else []
    if problems:
        raise UserError.many(problems, exit_code=2)
    written = dict[str, object](output_dir=None)
    if project.dataset is not None:
        written |= {"dataset_config": None, "train_data_dir": None, "reg_data_dir": None}
    if project.prompts is not None:
        written["sample_prompts"] = None
    absolute = {
        name: value.absolute()
        for name, value in project.values.items()
        if isinstance(value, Path) and name not in written and value.exists()
    }
    return Job(
        name=options.output_name or "lora",
        config_toml=options_to_toml(options.model_copy(update={**absolute, **written})),
        dataset_toml=dataset_to_toml(dataset) if dataset is not None else "",
        sample_prompts=(project.prompts or "") + "\n" if project.prompts else "",
    )


def _absolute(dataset: Mapping[str, object]) -> dict[str, object]:
    """The dataset with whole paths where a relative one leads somewhere from here: a run starts from another folder."""

    def whole(table: Mapping[str, object]) -> dict[str, object]:
        paths = {name: Path(str(table[name])) for name in _PATHS if isinstance(table.get(name), str)}
        return {**table, **{name: str(path.absolute()) for name, path in paths.items() if path.exists()}}

    datasets = [
        {**table, "subsets": [whole(subset) for subset in _tables(table, "subsets")]}
        for table in _tables(dataset, "datasets")
    ]
    return {**dataset, "datasets": datasets}


def _dataset_problems(dataset: Mapping[str, object], options: Options) -> list[Problem]:
    """What the trainer would find wrong with the dataset file, and folders that are not there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dataset.toml"
        path.write_text(dataset_to_toml(dataset), encoding="utf-8")
        try:
            config = read_dataset_config(path, options)
        except UserError as error:
            where = say("presets.dataset_file")
            return [replace(each, where=(each.where or "").replace(str(path), where)) for each in error.problems]
    subsets = [subset for entry in config.datasets for subset in entry.subsets]
    folders = [folder for subset in subsets for folder in (subset.image_dir, subset.conditioning_data_dir)]
    return [missing_folder(folder, "image_dir") for folder in folders if folder is not None and not folder.is_dir()]
