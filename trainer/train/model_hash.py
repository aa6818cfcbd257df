"""The SHA-256 of the base model, which LoRA files name: found without making training wait.

Reading 24 GB takes minutes on many disks. So the whole-file hash is computed in a background thread while training runs,
and files saved before it is known simply lack it. A file in the Hugging Face cache is stored under its hash, which costs
nothing. A model in several files has no single hash.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

from trainer.train.metadata import file_sha256

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelHash:
    """The hash of one file, or of none."""

    def __init__(self, file: Path | None) -> None:
        self._value: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if file is None:
            return
        blob = file.resolve().name
        if _SHA256.fullmatch(blob):
            self._value = blob
            return
        # A daemon: a run that ends first does not wait for it.
        self._thread = threading.Thread(target=self._compute, args=(file,), name="model-hash", daemon=True)
        self._thread.start()

    def value(self, wait_seconds: float = 0.0) -> str | None:
        """The hash if it is known, after waiting up to `wait_seconds` for it."""
        if self._thread is not None:
            self._thread.join(wait_seconds)
        return self._value

    def close(self) -> None:
        """Give up a hash that is still being computed."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _compute(self, file: Path) -> None:
        try:
            self._value = file_sha256(file, self._stop_if_asked)
        except (OSError, InterruptedError):
            return  # The file went away or the run ended: the key is left out.

    def _stop_if_asked(self, _done: int, _total: int) -> None:
        if self._stop.is_set():
            raise InterruptedError
