"""The words of a training command in pasted text: a command line or a script of bash, cmd or PowerShell.

Nothing is executed. Lines that go on are joined, quotes taken off, variables that the text itself sets are filled in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

Dialect = Literal["bash", "windows"]

SCRIPT: Final = "flux_train_network.py"
_CONTINUATION: Final = re.compile(r"[ \t]*(?<!\\)(?P<mark>\\|\^|`)[ \t]*\r?\n")
_DRIVE: Final = re.compile(r"(?:^|[\s\"'=])[A-Za-z]:\\")
_COMMENT: Final = re.compile(r"\s*(#|::|rem\b|@?echo\b)", re.IGNORECASE)
_BASH_VARIABLE: Final = re.compile(r"\$(?:\{(?P<braced>\w+)\}|(?P<plain>[A-Za-z_]\w*))")
_CMD_VARIABLE: Final = re.compile(r"%(?P<name>[A-Za-z_]\w*)%")
_BASH_SET: Final = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)
_CMD_SET: Final = re.compile(r'set\s+"?(?P<name>[A-Za-z_]\w*)=(?P<value>[^"]*)"?', re.IGNORECASE)
_TRAINER: Final = re.compile(r"(?:.*[\\/])?\w*train\w*\.py")


@dataclass(frozen=True)
class TrainingCommand:
    """A command in the text. `words` are those for the trainer, `launcher` those before its script (accelerate's).

    `script` is empty when the text has options only. `other_lines` are the text's other commands, `unset` the names of
    variables that the text uses and does not set.
    """

    words: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    script: str = ""
    other_lines: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()


def read_training_command(text: str) -> TrainingCommand:
    """The training command in `text`. Raises `ValueError` with the reason when it cannot be taken apart."""
    marks = {match["mark"] for match in _CONTINUATION.finditer(text)}
    dialect: Dialect = "windows" if marks & {"^", "`"} or _DRIVE.search(text) else "bash"
    joined = _CONTINUATION.sub(" ", text.replace("\r\n", "\n"))
    variables: dict[str, str] = {}
    unset: list[str] = []
    found: TrainingCommand | None = None
    bare: list[str] = []
    others: list[str] = []
    lines = [line.strip() for line in joined.split("\n")]
    for line in lines:
        if not line or (_COMMENT.match(line) and SCRIPT not in line):
            continue
        setting = (_BASH_SET if dialect == "bash" else _CMD_SET).fullmatch(line)
        if setting is not None and SCRIPT not in line:
            values = split_words(_filled(setting["value"], variables, []), dialect)
            variables[setting["name"]] = " ".join(values)
            continue
        if line.lstrip("\"'").startswith("-"):
            # Options on lines of their own, with or without marks that the line before goes on.
            words = split_words(_filled(line, variables, unset), dialect)
            if found is None:
                bare += words
            else:
                found = TrainingCommand((*found.words, *words), found.launcher, found.script)
            continue
        for command in _commands(split_words(_filled(line, variables, []), dialect, operators=True)):
            place = next((at for at, word in enumerate(command) if _TRAINER.fullmatch(word)), None)
            if place is None or found is not None:
                others.append(" ".join(command))
                continue
            _filled(line, variables, unset)
            found = TrainingCommand(tuple(command[place + 1 :]), tuple(command[:place]), command[place])
    if found is None and not bare:
        raise ValueError("there is no training command in it")
    if found is None:
        found = TrainingCommand(tuple(bare))
    return TrainingCommand(
        (*found.words, *(bare if found.script else ())),
        found.launcher,
        found.script,
        tuple(others),
        tuple(dict.fromkeys(unset)),
    )


def _filled(text: str, variables: dict[str, str], unset: list[str]) -> str:
    """`text` with the variables that are known; names of others go to `unset`."""

    def value(match: re.Match[str]) -> str:
        name = next(group for group in match.groups() if group is not None)
        if name not in variables:
            unset.append(name)
            return match[0]
        return variables[name]

    return _CMD_VARIABLE.sub(value, _BASH_VARIABLE.sub(value, text))


def _commands(words: list[str]) -> Iterator[list[str]]:
    """The commands of one line, which `&&`, `;`, `|` and `&` separate; what is behind `>` belongs to no command."""
    command: list[str] = []
    for word in words:
        if word in _OPERATORS:
            if command:
                yield command
            command = []
        else:
            command.append(word)
    if command:
        yield command


_OPERATORS: Final = ("\0&&", "\0;", "\0|", "\0&", "\0||")


def split_words(text: str, dialect: Dialect, *, operators: bool = False) -> list[str]:
    """The words of one line without their quotes. With `operators`, `;`, `|` and `&` outside of quotes are words of their
    own, marked by a zero in front. Raises `ValueError` for a quote that is not closed.
    """
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    position = 0
    while position < len(text):
        letter = text[position]
        position += 1
        following = text[position] if position < len(text) else ""
        if quote:
            if letter == quote:
                quote = ""
            elif dialect == "bash" and quote == '"' and letter == "\\" and following in '"\\$`':
                word = [*(word or []), following]
                position += 1
            elif dialect == "windows" and letter == "%" == following:
                word = [*(word or []), "%"]
                position += 1
            else:
                word = [*(word or []), letter]
        elif letter == '"' or (letter == "'" and (dialect == "bash" or word is None or word[-1] == "=")):
            quote = letter
            word = word or []
        elif letter.isspace():
            if word is not None:
                words.append("".join(word))
            word = None
        elif (dialect == "bash" and letter == "\\" and following) or (
            dialect == "windows" and letter in "^`" and following
        ):
            word = [*(word or []), following]
            position += 1
        elif dialect == "windows" and letter == "%" == following:
            word = [*(word or []), "%"]
            position += 1
        elif operators and letter in ";|&":
            if word is not None:
                words.append("".join(word))
            word = None
            double = following if following == letter and letter != ";" else ""
            position += len(double)
            words.append(f"\0{letter}{double}")
        elif dialect == "bash" and letter == "#" and word is None:
            break
        else:
            word = [*(word or []), letter]
    if quote:
        raise ValueError(f"a quote ({quote}) is opened and not closed: {text[:60]}...")
    if word is not None:
        words.append("".join(word))
    return words
