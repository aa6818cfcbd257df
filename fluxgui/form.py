"""The form's values as a job for the trainer, or as problems at their fields. No gradio.

The values are checked by the function that checks the command line, and the files are written by the functions that
write every config file, so that the form cannot mean something else than what it shows.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from fluxgui.dataset_extras import all_masks, read_repeats
from fluxgui.datasets import MASKS
from fluxgui.fields import DATASET_NAMES, NOT_IN_PRESETS, Field, make_fields
from fluxgui.language import say
from fluxgui.pictures import CAPTION_SUFFIX, PictureFolder, check_folder
from trainer.schema.advice import weak_defaults
from trainer.schema.base import Problem
from trainer.schema.cli import check_files, read_values, to_argv
from trainer.schema.dataset_file import dataset_to_toml
from trainer.schema.option_files import options_to_toml
from trainer.schema.options import SECRET_OPTIONS, Options
from trainer.schema.options_data import parse_resolution

FormValues = Mapping[str, object]

# Where the run folder has these files; the command line shown in the preview names them the same.
DATASET_FILE: Final = "dataset.toml"
PROMPTS_FILE: Final = "sample_prompts.txt"
OUTPUT_FOLDER: Final = "checkpoints"
DEFAULT_SIDE: Final = 512
"""Shown in the preview of dataset.toml, in pixels, as long as no size is given."""
_RUN_FOLDER_NAMES: Final = ("dataset_config", "sample_prompts", "output_dir")

NAMES_SHOWN: Final = 5
_NEEDED: Final = ("pretrained_model_name_or_path", "t5xxl", "clip_l", "ae", "image_dir", "output_name")


@dataclass(frozen=True)
class Job:
    """Everything a run folder is written from."""

    name: str
    config_toml: str
    dataset_toml: str
    sample_prompts: str


@dataclass(frozen=True)
class Reading:
    """What the form says. `job` is None while `problems` (to correct) or `missing` (still empty) hold anything.

    `options` is there as soon as the values themselves are right, whatever the files are like. `num_draws` is how often
    pictures are drawn in an epoch before `num_repeats`: those with repeats of their own count as often as they have.
    """

    options: Options | None
    job: Job | None
    problems: tuple[Problem, ...]
    missing: tuple[str, ...]
    pictures: PictureFolder | None
    notes: tuple[str, ...]
    command_line: str = ""
    config_toml: str = ""
    dataset_toml: str = ""
    num_draws: int = 0

    @property
    def problem_by_field(self) -> dict[str, str]:
        """The first problem of each field, as one text."""
        texts: dict[str, str] = {}
        for problem in self.problems:
            if problem.field is not None:
                texts.setdefault(problem.field, _sentence(problem))
        return texts


def _sentence(problem: Problem) -> str:
    """Problem and remedy as they stand at a field."""
    what = problem.what.rstrip(".")
    return f"{what[:1].upper()}{what[1:]}. {problem.hint or ''}".strip()


def _in_words_of_the_page(problem: Problem, fields: Mapping[str, Field]) -> Problem:
    """The problem as the page tells it: fields are called by their labels, and nobody is told which option was given,
    as the problem stands at its field. In the lines of more options, options keep their names."""
    if problem.field not in fields or problem.field == "more_options":
        return problem

    def label(match: re.Match[str]) -> str:
        field = fields.get(match["name"])
        return field.label if field is not None else match[0]

    def reword(text: str) -> str:
        text = re.sub(r",? ?(It is )?given as --\w+\.?", "", text)
        text = re.sub(r"--(?P<name>\w+)", label, text)
        text = re.sub(r"^(?P<name>[a-z]\w*)(?= is )", label, text)
        return re.sub(r"\b(?P<name>[a-z0-9]+(_[a-z0-9]+)+)\b", label, text).strip()

    return replace(problem, what=reword(problem.what), hint=reword(problem.hint) if problem.hint else problem.hint)


def missing_text(name: str) -> str:
    return say(f"train.needed_{name}")


def read_form(values: FormValues) -> Reading:
    """Check the whole form. Reads the headers of the model files and lists the folder of pictures, nothing more."""
    fields = make_fields()
    typed = {name: typed_value(field, values.get(name)) for name, field in fields.items()}
    problems: list[Problem] = []
    more = _more_options(typed["more_options"], problems)
    # Chroma has no CLIP-L.
    needed = [name for name in _NEEDED if name != "clip_l" or more.get("model_type") != "chroma"]
    missing = tuple(name for name in needed if typed[name] is None)
    problems += _own_problems(typed)

    prompts = cast("str | None", typed["sample_prompt_lines"])
    chosen = {
        name: value
        for name, value in typed.items()
        # Not by ==, to which 0 and False are the same.
        if name in Options.model_fields and value is not None and value is not False
    }
    chosen |= {name: False for name in typed if typed[name] is False and fields[name].default is True}
    if isinstance(chosen.get("max_train_epochs"), int) and isinstance(chosen.get("max_train_steps"), int):
        del chosen["max_train_steps"]  # epochs win; both boxes may be filled
    chosen |= {"dataset_config": DATASET_FILE, "output_dir": OUTPUT_FOLDER}
    if "network_module" not in more:
        chosen["network_module"] = "networks.lora_flux"
    if prompts is not None:
        chosen["sample_prompts"] = PROMPTS_FILE
    for name in sorted(set(more) & (set(chosen) | set(fields))):
        problems.append(Problem(say("train.own_place", name=name), say("train.more_options"), field="more_options"))
    chosen |= {name: value for name, value in more.items() if name not in chosen}

    options: Options | None = None
    notes: tuple[str, ...] = ()
    parsed = read_values(chosen, where=say("train.form"))
    if parsed.problems:
        problems += [_at_field(problem, fields, more) for problem in parsed.problems if problem.field not in missing]
    else:
        weak = weak_defaults(parsed.options, parsed.explicit)
        options, notes = parsed.options, (*([weak] if weak else []), *parsed.notes)
    wrong = {problem.field for problem in problems}
    problems += [
        problem
        # Also while other values are wrong, so that everything is shown at once.
        for problem in check_files(parsed.options)
        # The run folder has these, and it does not exist yet.
        if problem.field not in _RUN_FOLDER_NAMES and problem.field not in missing and problem.field not in wrong
    ]
    pictures: PictureFolder | None = None
    if typed["image_dir"] is not None:
        found = check_folder(cast("Path", typed["image_dir"]))
        if isinstance(found, Problem):
            problems.append(found)
        else:
            pictures = found
            problems += _mask_problems(found, is_asked_for=options is not None and options.masked_loss)

    problems = [_in_words_of_the_page(problem, fields) for problem in problems]
    reading = Reading(options, None, tuple(problems), missing, pictures, notes, num_draws=_num_draws(pictures))
    if options is None:
        return reading
    config_toml = options_to_toml(options.model_copy(update=dict.fromkeys(_RUN_FOLDER_NAMES)))
    dataset_toml = (
        dataset_to_toml(dataset_values(typed, pictures, has_masks=options.masked_loss)) if pictures is not None else ""
    )
    reading = replace(reading, command_line=shell_command(options), config_toml=config_toml, dataset_toml=dataset_toml)
    if problems or missing or pictures is None:
        return reading
    job = Job(
        name=options.output_name or "lora",
        config_toml=config_toml,
        dataset_toml=dataset_toml,
        sample_prompts=prompts + "\n" if prompts else "",
    )
    return replace(reading, job=job)


def _num_draws(pictures: PictureFolder | None) -> int:
    if pictures is None:
        return 0
    repeats = read_repeats(pictures.path)
    return sum(repeats.of(image.name) for image in pictures.images)


def typed_value(field: Field, value: object) -> object:
    """A component's value as the option's type; an empty box is None. What cannot be converted stays as it is,
    for the check of the options to name."""
    if isinstance(value, str):
        value = value.strip()
    if value is None or value == "":
        return None
    if field.kind == "path" and isinstance(value, str):
        return _path(value)
    if field.kind in ("integer", "number") and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = _number(value)
        return value if number is None else number
    return value


def _path(text: str) -> Path:
    """The path that was typed or pasted. Quotes around it come with a path copied from a file manager or a shell."""
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    path = Path(text.replace("\0", ""))
    with contextlib.suppress(RuntimeError):  # "~name" of somebody who has no account here: a folder of that name
        path = path.expanduser()
    return path.absolute()


def _number(value: float | str) -> int | float | None:
    """The number that was typed, whole where it is; None when it is none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _own_problems(typed: FormValues) -> list[Problem]:
    """Problems with what goes into the dataset file only, which the check of the options does not see."""
    problems: list[Problem] = []
    repeats = typed["num_repeats"]
    if repeats is not None and (not isinstance(repeats, int) or repeats < 1):
        what = say("train.bad_repeats", number=repeats)
        problems.append(Problem(what, field="num_repeats"))
    if typed["resolution"] is None:
        problems.append(Problem(say("train.no_size"), hint=say("train.no_size_hint"), field="resolution"))
    return problems


def _mask_problems(pictures: PictureFolder, *, is_asked_for: bool) -> list[Problem]:
    """Pictures without a mask in a folder where others have one, or with several: the trainer refuses it a little later."""
    masks = all_masks(pictures.path) if is_asked_for else {}
    if not masks:
        return []
    bare = [image.name for image in pictures.images if image.stem not in masks]
    stems = sorted({image.stem for image in pictures.images})
    twice = [path.name for stem in stems for path in masks.get(stem, ()) if len(masks[stem]) > 1]
    return [
        Problem(say(f"train.{what}", names=_some(names)), str(pictures.path), say(f"train.{what}_hint"), "image_dir")
        for what, names in (("masks_missing", bare), ("masks_twice", twice))
        if names
    ]


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join([*names[:NAMES_SHOWN], *([say("train.and_more", number=more)] if more > 0 else [])])


def _more_options(text: object, problems: list[Problem]) -> dict[str, object]:
    if text is None:
        return {}
    try:
        parsed = tomlkit.parse(str(text)).unwrap()
    except TOMLKitError as error:
        problems.append(
            Problem(
                say("train.not_toml", reason=error),
                say("train.more_options"),
                say("train.not_toml_hint"),
                "more_options",
            )
        )
        return {}
    values: dict[str, object] = {}
    for name, value in parsed.items():
        values |= value if isinstance(value, dict) else {name: value}
    for name in sorted(SECRET_OPTIONS & set(values)):
        # A run's folder holds its options as a file, which others may read.
        problems.append(
            Problem(
                say("train.is_secret", name=name),
                say("train.more_options"),
                say("train.is_secret_hint"),
                "more_options",
            )
        )
    return values


def _at_field(problem: Problem, fields: Mapping[str, Field], more: Mapping[str, object]) -> Problem:
    """The problem at the field where its value was typed."""
    if problem.field is not None and problem.field not in fields and problem.field in more:
        return replace(problem, field="more_options")
    return problem


def dataset_values(typed: FormValues, pictures: PictureFolder, *, has_masks: bool = False) -> dict[str, object]:
    """The dataset file's content: one dataset with one subset.

    `typed` must have passed the check of the options. The trigger word goes before every caption. Where no picture has
    a caption it is the caption (`class_tokens`). Repeats of single pictures come from the folder, and with `has_masks`
    its masks too, where it has some.
    """
    subset: dict[str, object] = {"image_dir": str(pictures.path), "num_repeats": typed["num_repeats"] or 1}
    trigger = typed["trigger_word"]
    if trigger is not None:
        has_captions = len(pictures.without_caption) < len(pictures.images)
        subset["caption_prefix" if has_captions else "class_tokens"] = trigger
    there = {image.name for image in pictures.images}
    repeats = {name: times for name, times in read_repeats(pictures.path).pictures.items() if name in there}
    if repeats:
        subset["picture_repeats"] = repeats
    if has_masks and all_masks(pictures.path):
        subset["conditioning_data_dir"] = str(pictures.path / MASKS)
    dataset = {
        key: typed[name]
        for name, key in DATASET_NAMES.items()
        if typed.get(name) is not None and typed[name] is not False
    }
    width, height = parse_resolution(typed["resolution"] or DEFAULT_SIDE)
    dataset["resolution"] = width if width == height else [width, height]
    return {"general": {"caption_extension": CAPTION_SUFFIX}, "datasets": [{**dataset, "subsets": [subset]}]}


def shell_command(options: Options) -> str:
    """The equal command line, one option a line."""
    words = ["python", "flux_train_network.py", *to_argv(options)]
    return " \\\n  ".join([" ".join(words[:2]), *(shlex.quote(word) for word in words[2:])])


def preset_values(values: FormValues) -> dict[str, object]:
    """The part of the form that a preset keeps, by name; empty boxes are left out."""
    fields = make_fields()
    typed = {name: typed_value(field, values.get(name)) for name, field in fields.items() if name not in NOT_IN_PRESETS}
    return {name: value for name, value in typed.items() if value is not None}
