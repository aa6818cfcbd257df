"""Downloads the four model files from the Hugging Face hub into the models folder, resuming what was begun.

A process of its own: the page only reads `downloads/progress.json`. SIGTERM cancels; what has arrived is kept, and the
next start goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from filelock import Timeout
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata, http_get
from huggingface_hub.utils import build_hf_headers
from tqdm.auto import tqdm

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import identify, read_header
from trainer.schema.folders import models_dir
from trainer.schema.model_sources import (
    FLUX_CHOICES,
    T5_CHOICES,
    FileProgress,
    ModelFile,
    Progress,
    download_lock,
    downloads_dir,
    needed_files,
)
from trainer.schema.run_folder import write_atomic
from trainer.schema.settings import hub_token

WRITE_SECONDS: Final = 0.5
PARTS: Final = ".download"
"""Folder below the models folder for what has arrived in part."""
SPARE_BYTES: Final = 1 << 30
"""What must be left on the disk afterwards."""
EXIT_DONE, EXIT_FIXABLE = 0, 3


class _Job:
    """The progress file, written at most twice a second."""

    def __init__(self, files: Sequence[ModelFile]) -> None:
        self.progress = Progress("running", tuple(FileProgress(f.field, f.name) for f in files), pid=os.getpid())
        self._written = 0.0
        self.write()

    def update(self, index: int, *, now: bool = False, **changes: Any) -> None:
        files = list(self.progress.files)
        files[index] = replace(files[index], **changes)
        self.progress = replace(self.progress, files=tuple(files))
        if now or time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def end(self, state: Any, message: str = "", hint: str = "") -> None:
        self.progress = replace(self.progress, state=state, message=message, hint=hint)
        self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk must not hide what is wrong
            write_atomic(downloads_dir() / "progress.json", self.progress.to_json(), durable=False)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer get-models", description="Download the four model files.")
    parser.add_argument("--flux", choices=FLUX_CHOICES, default="dev", help="which FLUX.1 (default: dev)")
    parser.add_argument("--t5", choices=T5_CHOICES, default="fp16", help="number format of T5-XXL (default: fp16)")
    parser.add_argument("--dir", type=Path, default=None, help="where they go (default: the models folder)")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.dir or models_dir()
    lock = download_lock()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError("a download is under way already", str(downloads_dir()), "Wait for it, or cancel it.") from None
    files = needed_files(chosen.flux, chosen.t5)
    job = _Job(files)

    def cancel(*_: object) -> None:
        job.end("cancelled")
        os._exit(EXIT_FIXABLE)

    signal.signal(signal.SIGTERM, cancel)
    try:
        _download_all(files, folder, job)
    except UserError as error:
        job.end("failed", error.problems[0].what, error.problems[0].hint or "")
        raise
    except KeyboardInterrupt:
        job.end("cancelled")
        raise
    except BaseException as error:
        job.end("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        lock.release()
    job.end("completed")
    for each in job.progress.files:
        print(f"--{each.field}={each.path}")
    return EXIT_DONE


def _download_all(files: Sequence[ModelFile], folder: Path, job: _Job) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    missing: list[tuple[int, ModelFile, HfFileMetadata]] = []
    remaining = 0
    for index, file in enumerate(files):
        path = folder / file.name
        if path.exists():
            # One that the user put there is used as it is, never replaced.
            _check(path, file)
            size = path.stat().st_size
            job.update(index, done=size, total=size, path=str(path), now=True)
            continue
        found = _ask(file, lambda file=file: _metadata(file))
        part, size = _part(folder, file, found), found.size or file.num_bytes
        begun = part.stat().st_size if part.exists() else 0
        job.update(index, done=begun, total=size, now=True)
        remaining += size - begun
        missing.append((index, file, found))
    free = shutil.disk_usage(folder).free
    if missing and free < remaining + SPARE_BYTES:
        raise UserError(
            f"the disk has {free / 2**30:.1f} GB free, and {remaining / 2**30:.1f} GB are still to come",
            str(folder),
            "Free some space, or choose a models folder on another disk in the settings.",
        )
    for index, file, found in missing:
        path = folder / file.name
        part = _part(folder, file, found)
        _ask(file, lambda index=index, file=file, part=part: _fetch(file, part, job, index))
        _check_content(part, found.etag)
        _check(part, file)
        part.replace(path)
        size = path.stat().st_size
        job.update(index, done=size, total=size, path=str(path), now=True)
    with contextlib.suppress(OSError):  # parts of another version of a file may be there
        (folder / PARTS).rmdir()


def _metadata(file: ModelFile) -> HfFileMetadata:
    return get_hf_file_metadata(hf_hub_url(file.repo_id, file.name), token=hub_token())


def _part(folder: Path, file: ModelFile, found: HfFileMetadata) -> Path:
    """Where the file grows; another version of it grows elsewhere."""
    version = re.sub(r"\W", "", found.etag or "unknown")[:16]
    return folder / PARTS / f"{file.name}.{version}"


def _fetch(file: ModelFile, part: Path, job: _Job, index: int) -> None:
    """Add what is missing to `part`. The library tries again by itself when the connection breaks; when an address that
    the hub gave is used up, after hours, another one is asked for as long as that brings anything."""
    part.parent.mkdir(exist_ok=True)
    while True:
        begun = part.stat().st_size if part.exists() else 0
        found = _metadata(file)
        headers = build_hf_headers(token=hub_token())
        if urlsplit(found.location).netloc != urlsplit(hf_hub_url(file.repo_id, file.name)).netloc:
            headers.pop("authorization", None)  # the token is the hub's business alone
        try:
            # Without a buffer, so that a download that is cancelled keeps what it has.
            with part.open("r+b" if begun else "wb", buffering=0) as stream:
                stream.seek(begun)
                http_get(
                    found.location,
                    stream,
                    resume_size=begun,
                    headers=headers,
                    expected_size=found.size,
                    tqdm_class=_bar(job, index),
                )
            return
        except HfHubHTTPError as error:
            if error.response.status_code != 403 or part.stat().st_size <= begun:
                raise


def _check_content(part: Path, etag: str | None) -> None:
    """Large files have their SHA-256 as their mark at the hub."""
    if etag is None or not re.fullmatch("[0-9a-f]{64}", etag):
        return
    digest = hashlib.sha256()
    with part.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != etag:
        part.unlink()
        raise UserError(f"{part.name} arrived damaged and was removed", str(part), "Start the download again.")


def _bar(job: _Job, index: int) -> type[tqdm]:
    class Bar(tqdm):
        """Puts what arrives into the progress file instead of a terminal."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            more["disable"] = False
            more["file"] = _Nowhere()
            more.pop("name", None)
            super().__init__(*arguments, **more)
            job.update(index, done=int(self.n), now=True)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            job.update(index, done=int(self.n))
            return shown

    return Bar


class _Nowhere:
    """A stream that takes everything."""

    def write(self, _text: str) -> int:
        return 0

    def flush(self) -> None:
        return None


def _check(path: Path, file: ModelFile) -> None:
    kind = identify(read_header(path))
    if kind != file.kind:
        raise UserError(f"{path.name} is not what it should be ({file.kind})", str(path), "Move it away and try again.")


def _ask(file: ModelFile, ask: Callable[[], Any]) -> Any:
    """What `ask` gives. Raises `UserError` that says what to do where the hub refuses or is not there."""
    page = f"{constants.ENDPOINT}/{file.repo_id}"
    try:
        return ask()
    except GatedRepoError:
        what, hint = (
            f"the hub does not give {file.name} to this account",
            f"Accept the licence at {page} with the account of your token.",
        )
        if hub_token() is None:
            what = f"{file.name} needs a token of the hub"
            hint = f"Accept the licence at {page}, make a token there, and put it into the settings (or HF_TOKEN)."
        raise UserError(what, file.repo_id, hint) from None
    except RepositoryNotFoundError:
        hint = (
            "The token may be wrong or too old: make a new one." if hub_token() else f"It may need a token: see {page}."
        )
        raise UserError(f"the hub does not know {file.repo_id}, or does not show it", file.repo_id, hint) from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE keeps this machine from asking the hub", file.repo_id, "Unset it.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "Make a new token." if status == 401 else "Try again later." if status >= 500 or status == 429 else None
        raise UserError(f"the hub answered with code {status} for {file.name}", file.repo_id, hint) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError("the disk is full", file.name, "Free some space and start again: it goes on.") from None
        if not isinstance(error, PermissionError):
            raise _unreachable(file) from None
        raise UserError(f"{file.name} cannot be written ({error.strerror})", str(models_dir())) from None
    except Exception as error:
        # The library lets errors of its HTTP client through, which has changed between versions.
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise _unreachable(file) from None
        raise


def _unreachable(file: ModelFile) -> UserError:
    hint = "Check the network, or set HF_ENDPOINT to a mirror; start again and it goes on from where it was."
    return UserError(f"the hub cannot be reached at {constants.ENDPOINT}", file.repo_id, hint)
