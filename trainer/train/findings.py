"""Problems found before a run, collected so that all of them are reported together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from trainer.schema.base import Problem, UserError, nearest
from trainer.schema.option_status import STATUS

EXIT_OPTIONS, EXIT_FIXABLE = 2, 3
_T = TypeVar("_T")


class Findings:
    """Collects problems; options outrank files in the exit code.

    `known` are problems with options that were found before. What follows from one of them is not reported again: an
    option that was misspelt is not missing as well.
    """

    def __init__(self, known: Sequence[Problem] = ()) -> None:
        self.problems: list[Problem] = list(known)
        self._exit_code = EXIT_OPTIONS if known else EXIT_FIXABLE
        meant = (nearest(problem.field, STATUS) for problem in known if problem.field is not None)
        self._settled = frozenset(name for name in meant if name is not None)

    def add(self, problem: Problem, exit_code: int = EXIT_FIXABLE) -> None:
        if problem in self.problems or problem.field in self._settled:
            return
        if exit_code == EXIT_OPTIONS:
            self._exit_code = EXIT_OPTIONS
        self.problems.append(problem)

    def attempt(self, work: Callable[[], _T]) -> _T | None:
        """The value of `work`, or None with its problems noted."""
        try:
            return work()
        except UserError as error:
            for problem in error.problems:
                self.add(problem, error.exit_code)
            return None

    def has(self, field: str) -> bool:
        """Whether a problem with this option is known."""
        return field in self._settled or any(problem.field == field for problem in self.problems)

    def raise_if_any(self) -> None:
        if self.problems:
            raise UserError.many(self.problems, exit_code=self._exit_code)
