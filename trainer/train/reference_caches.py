"""sd-scripts' cache files in a run: what of them is used, and writing them when asked for, with a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from trainer.data.cache import CacheRequest, TensorCache
from trainer.data.reference_files import ReferenceFile
from trainer.data.reference_store import num_foreign_files, read_valid, write_missing
from trainer.schema.options import Options
from trainer.train.check import CheckedRun
from trainer.train.reporting import Reporter

T = TypeVar("T")


class ReferenceCaches:
    """The files with one `ending` beside the pictures; `made_from` says, for people, what their contents depend on.

    `files` are those that a run of sd-scripts would look for; `num_without` counts pictures that have none.
    """

    def __init__(
        self,
        files: Sequence[ReferenceFile],
        num_without: int,
        cache: TensorCache,
        reporter: Reporter,
        *,
        ending: str,
        made_from: str,
    ) -> None:
        self._files = files
        self._num_without = num_without
        self._cache = cache
        self._reporter = reporter
        self._ending = ending
        self._made_from = made_from

    def note_foreign(self, checked: CheckedRun) -> None:
        """One line when there are files that prove nothing."""
        folders = {item.path.parent for item in checked.index.items}
        if num_foreign := num_foreign_files(folders, self._ending):
            self._reporter.note(
                f"{num_foreign} cache files of sd-scripts ({self._ending}) are not used: nothing in them says "
                f"{self._made_from} they were made from"
            )

    def read(self, missing: Sequence[CacheRequest[T]]) -> list[CacheRequest[T]]:
        """What is missing still, after the files gave what they provably hold."""
        if not missing:
            return []
        remaining = read_valid(self._files, missing, self._cache)
        if num_read := len(missing) - len(remaining):
            self._reporter.note(
                f"{num_read} of {len(missing)} were read from cache files for sd-scripts ({self._ending})"
            )
        return remaining

    def write(self, options: Options) -> None:
        """Writes what is missing or out of date. One process of a run does it."""
        written = write_missing(
            self._files,
            self._cache,
            warn=self._reporter.warning,
            skip_check=options.skip_cache_check,
            progress=self._reporter.progress,
            check_commands=self._reporter.check_stop,
        )
        line = f"{written.num_files} of {len(self._files)} cache files for sd-scripts ({self._ending}) were written"
        if written.num_foreign:
            line += f"; {written.num_foreign} that are not of this program stay as they are"
        if self._num_without:
            line += f"; {self._num_without} pictures have none, since another one's has the same name"
        self._reporter.note(line)
