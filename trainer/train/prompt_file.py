"""The sample prompts as their file has them now: it may be edited while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.schema.base import UserError
from trainer.train.sample_prompts import SamplePrompt, read_sample_prompts


class PromptFile:
    """Gives the prompts, read again when the file has changed.

    A file that is gone or wrong gives a warning, once for each change, and the last good prompts.
    """

    def __init__(self, path: Path, prompts: Sequence[SamplePrompt], warn: Callable[[str], None]) -> None:
        self._path = path
        self._prompts = prompts
        self._warn = warn
        self._seen = self._stamp()

    def __call__(self) -> Sequence[SamplePrompt]:
        stamp = self._stamp()
        if stamp == self._seen:
            return self._prompts
        self._seen = stamp
        try:
            self._prompts = read_sample_prompts(self._path)
        except UserError as error:
            self._warn(f"the sample prompts of before are used, for the file has changed and is wrong: {error}")
        return self._prompts

    def _stamp(self) -> bytes | None:
        """The content itself: an editor may keep size and time. None when it cannot be read."""
        try:
            return self._path.read_bytes()
        except OSError:
            return None


def texts_of(prompts: Sequence[SamplePrompt]) -> list[str]:
    """Every text that has to be encoded for the prompts."""
    texts: list[str] = []
    for prompt in prompts:
        texts.append(prompt.prompt)
        if prompt.uses_negative_prompt:
            texts.append(prompt.negative_prompt)
    return texts
