"""Problems found before a run, collected so that all of them are reported together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trainer.schema.base import Problem, UserError

EXIT_OPTIONS, EXIT_FIXABLE = 2, 3
_T = TypeVar("_T")


class Findings:
    """Collects problems; options outrank files in the exit code."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._exit_code = EXIT_FIXABLE

    def add(self, problem: Problem, exit_code: int = EXIT_FIXABLE) -> None:
        if exit_code == EXIT_OPTIONS:
            self._exit_code = EXIT_OPTIONS
        if problem not in self.problems:
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
        return any(problem.field == field for problem in self.problems)

    def raise_if_any(self) -> None:
        if self.problems:
            raise UserError.many(self.problems, exit_code=self._exit_code)
