"""The command line, and the same checks for values from a form, a preset or a run's config file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from trainer.schema.base import Problem, UserError, nearest, shown, with_home
from trainer.schema.cli_help import help_text
from trainer.schema.file_checks import check_files as check_files
from trainer.schema.option_files import non_default_values, options_path, options_to_toml, read_config_sections
from trainer.schema.option_reading import Given, read_options
from trainer.schema.option_status import STATUS
from trainer.schema.options import Options

_HELP: Final = ("-h", "--help")
_EXIT_OPTIONS: Final = 2
_NOT_WRITTEN: Final = {"config_file", "output_config", "run_dir", "wandb_api_key", "huggingface_token"}
"""What an options file does not hold: what belongs to one command, and secrets."""


@dataclass(frozen=True)
class ParsedCommand:
    """Checked options. `explicit` holds the names that were given; `notes` are lines for the user, in order.

    With `problems` the options are those that are right, for further checks; nothing may run on them.
    """

    options: Options
    explicit: frozenset[str]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    def without_problems(self) -> ParsedCommand:
        """This command. Raises `UserError` (exit code 2) with every problem where there are some."""
        if self.problems:
            raise UserError.many(self.problems, exit_code=_EXIT_OPTIONS)
        return self


def parse_command_line(argv: Sequence[str]) -> ParsedCommand:
    """Options from the words of a command line, with `--config_file` below them.

    As in the reference trainer names may be shortened while they stay unambiguous, and the last of repeated options
    counts. `--help` writes the help and exits. Raises `UserError` (exit code 2) with every problem.
    """
    return read_command_line(argv).without_problems()


def read_command_line(argv: Sequence[str]) -> ParsedCommand:
    """The same with the problems inside, so that more can be checked before they are reported."""
    words = list(argv)
    problems: list[Problem] = []
    notes: list[str] = []
    given, asks_for_help = _split_words(words, problems, notes)
    if asks_for_help:
        sys.stdout.write(help_text())
        raise SystemExit(0)
    config_file = given.get("config_file")
    if config_file is None or config_file.value == "":
        if "output_config" in given:
            what, hint = "output_config needs the file to write", "Give its name as --config_file."
            problems.append(Problem(what, "--output_config", hint, "output_config"))
    elif "output_config" not in given:
        del given["config_file"]
        given = {**_config_values(Path(with_home(str(config_file.value))), problems, notes), **given}
    return _finished(given, problems, notes)


def validate_options(values: Mapping[str, object], *, where: str) -> ParsedCommand:
    """The same checks for values by name, which `where` names the place of. An unknown name is an error here."""
    return read_values(values, where=where).without_problems()


def read_values(values: Mapping[str, object], *, where: str) -> ParsedCommand:
    """The same with the problems inside."""
    problems: list[Problem] = []
    given: dict[str, Given] = {}
    for name, value in values.items():
        if name == "config_file" and value is not None:
            what, hint = "config_file has no effect here", "Give it on the command line."
            problems.append(Problem(what, where, hint, name))
        elif name in STATUS:
            given[name] = Given(value, where)
        else:
            problems.append(_unknown(name, where))
    return _finished(given, problems, [])


def to_argv(options: Options) -> list[str]:
    """The words of a command line that gives the same options: every option that is not at its default."""
    words: list[str] = []
    for name, value in non_default_values(options).items():
        if STATUS[name].value_type == "flag":
            words.append(f"--{name}")
        elif STATUS[name].is_list:
            words += [f"--{name}", *(shown(item) for item in cast("tuple[object, ...]", value))]
        else:
            words.append(f"--{name}={shown(value) if value != '' else ''}")
    return words


def write_config(options: Options) -> Path:
    """Writes the options to their `config_file`, without itself and without secrets. Gives the path.

    Raises `UserError` when the file exists or cannot be written.
    """
    if options.config_file is None:
        raise ValueError("these options name no file")
    path = options_path(options.config_file)
    left_out = {name: Options.model_fields[name].get_default() for name in _NOT_WRITTEN & set(Options.model_fields)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(options_to_toml(options.model_copy(update=left_out)))
    except FileExistsError:
        what, hint = "this file exists and is left as it is", "Give another --config_file, or remove it."
        raise UserError(what, str(path), hint, field="config_file", exit_code=_EXIT_OPTIONS) from None
    except OSError as error:
        what = f"this file cannot be written ({error.strerror or error})"
        raise UserError(what, str(path), "Give another --config_file.", field="config_file") from None
    return path


def _finished(given: Mapping[str, Given], problems: Sequence[Problem], notes: Iterable[str]) -> ParsedCommand:
    reading = read_options(given)
    found = (*problems, *reading.problems)
    return ParsedCommand(reading.options, reading.explicit, (*notes, *reading.notes), found)


def _unknown(name: str, where: str, *, dashes: str = "") -> Problem:
    near = nearest(name, STATUS)
    hint = f"Did you mean {dashes}{near}?" if near else "--help lists the options."
    return Problem(f"{dashes}{name} is not a known option", where, hint, name)


def _config_values(path: Path, problems: list[Problem], notes: list[str]) -> dict[str, Given]:
    """The known options of an options file; an unknown one is a note, as other programs write such files too."""
    given: dict[str, Given] = {}
    try:
        sections = read_config_sections(path)
    except UserError as error:
        problems += error.problems
        return given
    for section, values in sections:
        where = f"{path}, [{section}]" if section else str(path)
        for name, value in values.items():
            if name in ("config_file", "output_config"):
                notes.append(f"{name} in {where} has no effect: it belongs on the command line")
            elif name in STATUS:
                _note_second_value(given, name, value, notes)
                given[name] = Given(value, where)
            else:
                near = nearest(name, STATUS)
                asks = f"; did you mean {near}?" if near else ""
                if name in ("datasets", "subsets"):
                    asks = "; a dataset file is given as --dataset_config"
                notes.append(f"{name} in {where} is not a known option and has no effect{asks}")
    return given


# ----------------------------------------------------------------------------------------------------------- words


def _note_second_value(given: Mapping[str, Given], name: str, value: object, notes: list[str]) -> None:
    """As in the reference, the last one counts."""
    if name in given and given[name].value != value:
        before = shown(given[name].value)
        notes.append(f"{name} is given twice: {before} has no effect beside {shown(value)}, which comes later")


def _split_words(words: Sequence[str], problems: list[Problem], notes: list[str]) -> tuple[dict[str, Given], bool]:
    """Options by full name from the words, and whether help is asked for."""
    given: dict[str, Given] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word in _HELP or (len(word) > 3 and "--help".startswith(word)):
            return {}, True
        if not _is_option(word):
            problems.append(
                Problem(f'"{word}" belongs to no option', "the command line", _stray_hint(words, position - 1))
            )
            continue
        typed, equals, attached = word.partition("=")
        name = _full_name(typed, problems)
        values: list[str] = []
        if name is None:
            # What follows was meant for it.
            while position < len(words) and not equals and not _is_option(words[position]):
                position += 1
            continue
        status = STATUS[name]
        if equals:
            values = [attached]
        elif status.value_type != "flag":
            limit = len(words) if status.is_list else position + 1
            while position < min(limit, len(words)) and not _is_option(words[position]):
                values.append(words[position])
                position += 1
        if status.value_type == "flag":
            if equals:
                what = f"{name} is a switch and takes no value, but {shown(attached)} is given"
                problems.append(Problem(what, typed, f"Write --{name} to turn it on, or leave it out.", name))
            given[name] = Given(True, typed)
        elif status.is_list:
            _note_second_value(given, name, tuple(values), notes)
            given[name] = Given(tuple(values), f"--{name}")
        elif not values:
            problems.append(Problem(f"{name} needs a value", f"--{name}", f"Write --{name}=...", name))
        else:
            _note_second_value(given, name, values[0], notes)
            given[name] = Given(values[0], f"--{name}")
    return given, False


def _is_option(word: str) -> bool:
    """Whether a word names an option, as argparse decides: not a number, and no spaces in a name of its own."""
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return " " not in word.partition("=")[0]
    return False


def _full_name(typed: str, problems: list[Problem]) -> str | None:
    """The option that was typed in full or shortened; our own options never make the reference's ambiguous."""
    name = typed.removeprefix("--")
    if typed.startswith("--") and name in STATUS:
        return name
    if typed.startswith("--") and name:
        longer = [known for known in STATUS if known.startswith(name)]
        matches = [known for known in longer if not STATUS[known].is_ours] or longer
        if len(matches) == 1:
            return matches[0]
        if matches:
            what = f"{typed} is not unique: {', '.join(f'--{match}' for match in sorted(matches))}"
            problems.append(Problem(what, "the command line", "Write the option in full.", name))
            return None
    problems.append(_unknown(typed.lstrip("-"), "the command line", dashes="--"))
    return None


def _stray_hint(words: Sequence[str], position: int) -> str | None:
    before = words[position - 1].removeprefix("--") if position else ""
    if before in STATUS and STATUS[before].value_type == "flag":
        return f"--{before} is a switch and takes no value."
    return "A value with spaces needs quotes."
