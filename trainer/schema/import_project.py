"""Other tools' projects, pasted as text: what they say as options and pictures, and what of it was not understood.

Taken are command lines and scripts for sd-scripts (bash, cmd, PowerShell; fluxgym writes such scripts), options files in
TOML as sd-scripts and kohya_ss have them, the settings file (JSON) of kohya_ss, and dataset files. The options are those
that the command line parser gives for the same project.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from trainer.schema.base import Problem, UserError, nearest
from trainer.schema.cli import ParsedCommand, read_command_line, read_values
from trainer.schema.import_kohya import KohyaSettings, as_table, is_kohya_settings
from trainer.schema.option_files import non_default_values
from trainer.schema.option_status import STATUS
from trainer.schema.options import SECRET_OPTIONS, Options
from trainer.schema.shell_words import SCRIPT, TrainingCommand, read_training_command

ProjectKind = Literal["command", "options", "kohya_ss", "dataset"]
ReadFile = Callable[[Path], str]

MAX_BYTES: Final = 1_000_000
_EXIT_OPTIONS: Final = 2

# Names in options files of kohya_ss that its trainer does not read either.
_READ_BY_NOBODY: Final = frozenset(
    {"epoch", "noise_offset_type", "lowvram", "stop_text_encoder_training", "mem_eff_save", "single_blocks_to_swap"}
)
# accelerate's own options, before the script: with these the trainer here does the same by itself.
_LAUNCHER_WITHOUT_MEANING: Final[Mapping[str, tuple[str, ...]]] = {
    "--mixed_precision": ("no", "fp16", "bf16"),
    "--num_cpu_threads_per_process": (),
    "--num_processes": ("1",),
    "--num_machines": ("1",),
    "--dynamo_backend": ("no",),
    "--machine_rank": ("0",),
}
_OPTION: Final = re.compile(r"(?:^|\s)[\"']?--[A-Za-z]")
_INTERPRETERS: Final = ("accelerate", "launch", "python", "python3", "py", "-m", "-u", "accelerate.exe", "python.exe")


@dataclass(frozen=True)
class ImportedProject:
    """A project as it was understood. `values` are the options that were given, by name, with their checked values.

    `dataset` is a dataset file's content and `prompts` the sample prompts, where the text or a file it names has them.
    `changed` are things that mean something else or nothing here, `not_understood` those that were left out,
    `problems` those that keep the project from being trained as it is.
    """

    kind: ProjectKind
    options: Options
    values: Mapping[str, object]
    dataset: Mapping[str, object] | None = None
    prompts: str | None = None
    changed: tuple[str, ...] = ()
    not_understood: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass
class _Draft:
    dataset: Mapping[str, object] | None = None
    prompts: str | None = None
    changed: list[str] = field(default_factory=list[str])
    not_understood: list[str] = field(default_factory=list[str])


def import_project(text: str, files: str = "", *, read_file: ReadFile | None = None) -> ImportedProject:
    """Understand `text`. `files` may hold the dataset or options file that it names, pasted as well.

    Files that are named and not pasted are read with `read_file` when it is given. Raises `UserError` (exit code 2) when
    the text is of none of the known kinds.
    """
    for name, pasted in (("this text", text), ("the second text", files)):
        if len(pasted.encode()) > MAX_BYTES:
            raise UserError(
                f"{name} is longer than any project", hint="Paste the command or the file alone.", exit_code=2
            )
    if not text.strip():
        raise UserError("there is nothing to import", hint="Paste a command, a script or a file.", exit_code=2)
    draft = _Draft()
    second = _second_file(files)
    options_file: Mapping[str, object] | None = None
    if second is not None:
        if "datasets" in second:
            draft.dataset = second
        else:
            options_file = second
    table, is_json = _table(text)
    if table is None:
        kind, parsed = "command", _from_command(text, options_file, draft)
    elif "datasets" in table:
        draft.dataset = table
        kind, parsed = "dataset", read_values(options_file or {}, where="the options file")
    elif is_json and is_kohya_settings(table):
        kind, parsed = "kohya_ss", _from_kohya(table, draft)
    else:
        where = "the pasted file"
        kind, parsed = "options", _from_options(table, where, draft)
    return _finished(kind, parsed, draft, read_file)


def _second_file(files: str) -> Mapping[str, object] | None:
    if not files.strip():
        return None
    table, _ = _table(files)
    if table is None:
        what, hint = "the second text is neither TOML nor JSON", "Paste the dataset file, or leave it empty."
        raise UserError(what, hint=hint, exit_code=_EXIT_OPTIONS)
    return table


def _table(text: str) -> tuple[dict[str, object] | None, bool]:
    """The text as JSON or TOML and whether it is JSON; None when it is neither, or a command."""
    stripped = text.strip().lstrip("\ufeff")
    if stripped.startswith("{"):
        try:
            found = as_table(json.loads(stripped))
        except (ValueError, RecursionError) as error:
            what = f"this looks like JSON and is none: {error}"
            raise UserError(what, hint="Paste the whole file.", exit_code=_EXIT_OPTIONS) from None
        return found, True
    is_command = "train_network" in text or _OPTION.search(text) is not None
    try:
        return cast("dict[str, object]", tomlkit.parse(stripped).unwrap()), False
    except (TOMLKitError, RecursionError) as error:
        if is_command:
            return None, False
        what = f"this is neither a training command nor a file of options: {error}"
        hint = f"A command names {SCRIPT} or has options such as --network_dim=16; a file is TOML or JSON."
        raise UserError(what, hint=hint, exit_code=_EXIT_OPTIONS) from None


# ------------------------------------------------------------------------------------------------------------- kinds


def _from_command(text: str, options_file: Mapping[str, object] | None, draft: _Draft) -> ParsedCommand:
    try:
        command = read_training_command(text)
    except ValueError as error:
        hint = f"A command names {SCRIPT} or has options such as --network_dim=16."
        raise UserError(f"this text cannot be understood: {error}", hint=hint, exit_code=_EXIT_OPTIONS) from None
    if not command.script.endswith(SCRIPT) and command.script:
        draft.changed.append(f"the command is for {command.script}; FLUX.1 is trained here")
    draft.not_understood += [f"other line of the script: {line}" for line in command.other_lines]
    draft.not_understood += [
        f"the variable {name} is set outside of this text: replace it by its value" for name in command.unset
    ]
    _read_launcher(command, draft)
    words = [word for word in command.words if word not in ("-h", "--help")]
    if options_file is not None:
        words = _without_config_file(words)
    parsed = read_command_line(words)
    problems = [problem for problem in parsed.problems if problem.field in STATUS]
    draft.not_understood += [_with_values(problem, words) for problem in parsed.problems if problem.field not in STATUS]
    parsed = ParsedCommand(parsed.options, parsed.explicit, parsed.notes, tuple(problems))
    if options_file is None:
        return parsed
    below = _known(options_file, "the options file", draft)
    above = {name: getattr(parsed.options, name) for name in parsed.explicit}
    merged = read_values({**below, **above}, where="the options file")
    return ParsedCommand(merged.options, merged.explicit, merged.notes, (*problems, *merged.problems))


def _read_launcher(command: TrainingCommand, draft: _Draft) -> None:
    words = list(command.launcher)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if Path(word).name in _INTERPRETERS or word in _INTERPRETERS:
            continue
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            draft.not_understood.append(f"{word}: set before the command, outside of the trainer")
            continue
        while not equals and position < len(words) and not words[position].startswith("-"):
            value = f"{value} {words[position]}".strip()
            position += 1
        known = _LAUNCHER_WITHOUT_MEANING.get(name)
        if known is not None and (not known or value in known):
            draft.changed.append(f"{name} {value} before the script is accelerate's; it is not needed here")
        else:
            draft.not_understood.append(f"{name} {value}".strip() + ": an option of accelerate, before the script")


def _without_config_file(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word.partition("=")[0] != "--config_file":
            kept.append(word)
        skip = word == "--config_file"
    return kept


def _with_values(problem: Problem, words: Sequence[str]) -> str:
    """The problem, with what was given to an option that nobody knows."""
    hint = f" {problem.hint}" if problem.hint and problem.hint.startswith("Did you mean") else ""
    typed = f"--{problem.field}"
    for position, word in enumerate(words):
        if word == typed or word.startswith(f"{typed}="):
            values = [word]
            for following in words[position + 1 :]:
                if following.startswith("--") or "=" in word:
                    break
                values.append(following)
            return f"{' '.join(values)}: there is no such option.{hint}"
    return f"{problem.what}.{hint}"


def _from_kohya(table: Mapping[str, object], draft: _Draft) -> ParsedCommand:
    settings = KohyaSettings(table)
    draft.changed += settings.changed
    draft.not_understood += settings.left_out
    if settings.prompts is not None:
        draft.prompts = settings.prompts
    values = _known(settings.values, "the settings of kohya_ss", draft)
    if settings.additional:
        more = _from_command(settings.additional, None, draft)
        values |= {name: getattr(more.options, name) for name in more.explicit}
    return read_values(values, where="the settings of kohya_ss")


def _from_options(table: Mapping[str, object], where: str, draft: _Draft) -> ParsedCommand:
    return read_values(_known(table, where, draft), where=where)


def _known(table: Mapping[str, object], where: str, draft: _Draft) -> dict[str, object]:
    """The options among the values, whatever section they stand in; the others are told."""
    values: dict[str, object] = {}
    flat: list[tuple[str, str, object]] = []
    for name, value in table.items():
        section = as_table(value)
        # Sections come after the lines before the first one, as an options file has it.
        flat += [("", name, value)] if section is None else [(name, key, entry) for key, entry in section.items()]
    for section, name, value in flat:
        if name in ("config_file", "output_config"):
            draft.changed.append(f"{name} has no effect in a file: it belongs on the command line")
        elif name in STATUS:
            values[name] = value
        elif name in _READ_BY_NOBODY:
            draft.changed.append(f"{name} = {value}: kohya_ss's own note, which the trainer does not read")
        else:
            near = nearest(name, STATUS)
            place = f" in [{section}]" if section else ""
            draft.not_understood.append(
                f"{name} = {value!r}{place}: there is no such option." + (f" Did you mean {near}?" if near else "")
            )
    return values


# ------------------------------------------------------------------------------------------------------------ finish


def _finished(kind: ProjectKind, parsed: ParsedCommand, draft: _Draft, read_file: ReadFile | None) -> ImportedProject:
    options = parsed.options
    values = given_values(options, parsed.explicit)
    for name in sorted(SECRET_OPTIONS & set(values)):
        del values[name]
        options = options.model_copy(update={name: None})
        draft.changed.append(
            f"{name} is a secret and is not taken over; tokens belong into the settings or the environment"
        )
    if read_file is not None:
        _read_named_files(options, draft, read_file)
    # The prompts are there, if not as a file.
    no_prompts = "no samples are made: sample_prompts is not given"
    draft.changed += [note for note in parsed.notes if draft.prompts is None or note != no_prompts]
    return ImportedProject(
        kind,
        options,
        values,
        draft.dataset,
        draft.prompts,
        tuple(dict.fromkeys(draft.changed)),
        tuple(dict.fromkeys(draft.not_understood)),
        parsed.problems,
    )


def given_values(options: Options, explicit: Iterable[str]) -> dict[str, object]:
    """The options that were given, and those that follow from them; read again they give the same options."""
    found = non_default_values(options)
    names = {*found, *(name for name in explicit if name in Options.model_fields)}
    return {name: getattr(options, name) for name in Options.model_fields if name in names}


def _read_named_files(options: Options, draft: _Draft, read_file: ReadFile) -> None:
    """The dataset and the prompts that the options name, as far as they can be read here."""
    path = options.dataset_config
    if draft.dataset is None and path is not None:
        try:
            table, _ = _table(read_file(path))
            draft.dataset = table
        except (OSError, ValueError, UserError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            draft.not_understood.append(f"the dataset file {path} cannot be read here ({reason}): paste it as well")
    path = options.sample_prompts
    if draft.prompts is None and path is not None:
        if path.suffix.lower() != ".txt":
            draft.not_understood.append(f"the prompts file {path}: only lines of text can be shown in the form")
            return
        try:
            draft.prompts = read_file(path).strip() or None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            draft.not_understood.append(f"the prompts file {path} cannot be read here ({reason})")
