"""SHA-256 of the model files, computed beside the training.

Reading 24 GB takes half a minute and more, so nothing waits for it: a LoRA is written with the hashes that are ready, and
only the final one is written once more when the rest has come. A file that was hashed before and has not changed since is not
read again.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from trainer.schema.run_folder import write_atomic
from trainer.train.model_hashes import file_sha256

HASHES_FILE = "model_hashes.json"
"""In the data folder: the hashes of model files that were read before."""

_POLL_SECONDS = 0.2


class HashingStopped(Exception):
    """Ends the reading of a file."""


class FileHashes:
    """Hashes of `files` (by any name) from `start` on, in a thread of its own.

    `memory` is a JSON file with the hashes of earlier runs; it may be missing, and is no more than a saving of time. A
    folder, or a file that cannot be read, has no hash.
    """

    def __init__(self, files: Mapping[str, Path], memory: Path | None) -> None:
        self._files = dict(files)
        self._memory = memory
        self._hashes: dict[str, str] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="file-hashes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether no further hash will come: all are known, or nothing was started."""
        return not self._thread.is_alive()

    def ready(self) -> dict[str, str]:
        """The hashes known by now."""
        return dict(self._hashes)

    def finish(self, should_stop: Callable[[], bool]) -> dict[str, str]:
        """All hashes; those that are ready when `should_stop` says so while waiting."""
        while not self.is_done and not should_stop():
            self._thread.join(_POLL_SECONDS)
        return self.ready()

    def close(self) -> None:
        """Ends the thread soon, wherever it is."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        known = _read_memory(self._memory)
        for name, path in self._files.items():
            with contextlib.suppress(OSError, HashingStopped):
                if path.is_dir():
                    continue
                mark = _mark(path)
                if mark not in known:
                    known[mark] = file_sha256(path, self._on_progress)
                    _write_memory(self._memory, known)
                self._hashes[name] = known[mark]

    def _on_progress(self, _done: int, _total: int) -> None:
        if self._stopped.is_set():
            raise HashingStopped


def files_identity(paths: Sequence[Path], memory: Path | None, check_commands: Callable[[], object]) -> str:
    """Tells a model in one or more files from all others, by all their bytes; copies and renamed files are the same.

    What is not in `memory` is read whole, a second for every gigabyte or two; `check_commands` may raise meanwhile.
    """
    known = _read_memory(memory)
    hashes: list[str] = []
    for path in paths:
        mark = _mark(path)
        if mark not in known:
            known[mark] = file_sha256(path, lambda _done, _total: check_commands())
            _write_memory(memory, known)
        hashes.append(known[mark])
    return "+".join(hashes)


def _mark(path: Path) -> str:
    """What changes when a file's content does. Raises `OSError`."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def _read_memory(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        stored: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: value for key, value in cast("dict[str, object]", stored).items() if isinstance(value, str)}


def _write_memory(path: Path | None, known: Mapping[str, str]) -> None:
    if path is None:
        return
    # Another run may have written meanwhile; what it knows is kept.
    merged = {**_read_memory(path), **known}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(merged, indent=1).encode())
