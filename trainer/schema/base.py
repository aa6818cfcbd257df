"""What the whole schema shares: the description of an option, its groups, and the one error type that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, cast

Level = Literal["basic", "advanced", "expert"]


@dataclass(frozen=True)
class Opt:
    """What the interface and the help text say about an option.

    `level` is who needs it. `unit` is shown beside the value.
    """

    help: str
    label: str
    level: Level = "advanced"
    unit: str | None = None


GROUP_TITLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "model": "Model files and tokenizers",
        "dataset": "Pictures and captions; a dataset file's own values win over these",
        "network": "The LoRA network",
        "course": "How long and in which portions",
        "optimizer": "Optimizer and learning-rate schedule",
        "flow": "Noise levels, prediction and loss",
        "memory": "Device, number formats and what trades time for memory",
        "devices": "Several devices",
        "cache": "What is computed once instead of in every step",
        "validation": "A loss on pictures that are not trained on",
        "saving": "Where the LoRA goes, and how often",
        "hub": "Upload to the Hugging Face hub",
        "samples": "Pictures made during training",
        "logs": "Console and trackers",
        "metadata": "What is written into the LoRA's file beside its weights",
    }
)
"""Every group of options in the order in which they are shown."""

Status = Literal["supported", "inert", "refused"]
ValueType = Literal["flag", "text", "path", "integer", "number", "steps"]
"""`steps` is a whole number, or a part of the run as 0.1 or 10%."""


@dataclass(frozen=True)
class OptionStatus:
    """What is known about one option, whether or not it is supported.

    `reason` says why an option is inert or refused, and names the alternative where there is one. `choices` are the
    reference's; `refused_values` maps those that are refused, as they are spelt, to the reason. A refused option may
    still be given at its default, where it changes nothing. `group` is a name of `GROUP_TITLES`; `bounds` is the range
    in words, such as "1 to 1024", where there is one.
    """

    status: Status
    value_type: ValueType
    reason: str = ""
    choices: tuple[str, ...] = ()
    is_list: bool = False
    default: object = None
    is_ours: bool = False
    refused_values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    group: str = ""
    level: Level = "expert"
    help: str = ""
    unit: str | None = None
    bounds: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that the user can fix: what is wrong, where it was written, what to do, and the option it belongs to."""

    what: str
    where: str | None = None
    hint: str | None = None
    field: str | None = None

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        hint = f" {self.hint}" if self.hint else ""
        what = self.what if self.what.endswith("...") else self.what.rstrip(".")
        return f"{what}{place}.{hint}"


class UserError(Exception):
    """A failure that the user can fix, with every problem of its kind.

    `exit_code` is 2 for wrong options or TOML, 3 for files, data and memory.
    """

    problems: tuple[Problem, ...]
    exit_code: int

    def __init__(
        self,
        what: str,
        where: str | None = None,
        hint: str | None = None,
        *,
        field: str | None = None,
        exit_code: int = 3,
    ) -> None:
        super().__init__(what, where, hint)
        self.problems = (Problem(what, where, hint, field),)
        self.exit_code = exit_code

    @classmethod
    def many(cls, problems: Sequence[Problem], *, exit_code: int) -> UserError:
        """One error for several problems; `problems` must not be empty."""
        if not problems:
            raise ValueError("an error needs at least one problem")
        first = problems[0]
        error = cls(first.what, first.where, first.hint, field=first.field, exit_code=exit_code)
        error.problems = tuple(problems)
        return error

    def __str__(self) -> str:
        """All problems, one per line."""
        return "\n".join(str(problem) for problem in self.problems)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, or None when nothing is close."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def with_home(text: str) -> str:
    """A path with a `~` at its beginning replaced by the user's folder, as shells do it between spaces only."""
    return str(Path(text).expanduser()) if text == "~" or text.startswith(("~/", "~\\")) else text


def shown(value: object) -> str:
    """A value as a person would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return " ".join(shown(item) for item in cast("Sequence[object]", value)) or "empty"
    return str(value) if value != "" else "empty"
