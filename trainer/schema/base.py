"""What the whole schema shares: the description of an option, and the one error type that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Level = Literal["basic", "advanced", "expert", "hidden"]


@dataclass(frozen=True)
class Opt:
    """What the interface and the help text say about an option.

    `level` is who needs it: "hidden" options are set by the program itself. `unit` is shown beside the value.
    """

    help: str
    label: str
    level: Level = "advanced"
    unit: str | None = None


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
        return f"{self.what.rstrip('.')}{place}.{hint}"


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


def shown(value: object) -> str:
    """A value as a person would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return " ".join(shown(item) for item in cast("Sequence[object]", value)) or "empty"
    return str(value) if value != "" else "empty"
