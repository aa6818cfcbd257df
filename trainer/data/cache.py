"""What an encoder makes of pictures and captions, computed once: in memory, or on disk beside the pictures.

Files are found by what went into them, so an edited caption, a replaced picture or another encoder never meets an old
result. The reference trainer names its files after the picture alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trainer.data.images import Picture, map_ahead, read_pixels
from trainer.data.index import DatasetIndex, Progress
from trainer.schema.base import Problem, UserError

T = TypeVar("T")
Entry = dict[str, Tensor]

CACHE_FOLDER = ".flux_cache"
"""Folder of the cached files, inside the pictures' folder. It may be deleted at any time."""

FORMAT_VERSION = 1
"""Part of every key; raised when the same inputs begin to give another result."""

_SEAL = "fluxgui_cache"
"""The file's metadata field."""

_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 65_536
_START_BYTES = 1_048_576


@dataclass(frozen=True)
class CacheRequest(Generic[T]):
    """One entry that training will need. `load` gives the encoder's input; requests of one `group` may share a batch.

    `folder` is where the picture lies; None keeps the entry in memory.
    """

    key: str
    folder: Path | None
    group: tuple[int, ...]
    load: Callable[[], T]


def files_identity(files: Sequence[Path]) -> str:
    """The identity of a model in one or more files."""
    return "+".join(file_identity(path) for path in files)


def file_identity(path: Path) -> str:
    """A short hash that tells an encoder's file from others: its size, its first MiB and 64 blocks spread over it.

    A checkpoint of ten gigabytes is identified in milliseconds; copies and renamed files are the same.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_START_BYTES))
        for block in range(_SAMPLED_BLOCKS):
            file.seek(size * block // _SAMPLED_BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]


def latent_key(picture: Picture, *, encoder: str) -> str:
    """The key of a picture's latents. `encoder` says which autoencoder, in which precision."""
    return _key(
        "latents",
        picture.digest,
        picture.resized,
        picture.bucket,
        picture.crop,
        picture.is_flipped,
        picture.resize_interpolation,
        encoder,
    )


def text_key(caption: str, *, encoder: str, max_length: int, apply_mask: bool) -> str:
    """The key of a caption's encodings. `encoder` says which text encoders and tokenizers, in which precision."""
    return _key("text", caption, encoder, max_length, apply_mask)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()[:40]


def latent_requests(index: DatasetIndex, *, encoder: str) -> list[CacheRequest[Tensor]]:
    """Every picture to encode, both ways round where it may be flipped; `load` gives (3, height, width).

    Raises `UserError` for subsets with random crops: there is no end of them.
    """
    _refuse_random_crops(index)
    return [
        CacheRequest(
            latent_key(picture, encoder=encoder), picture.path.parent, picture.bucket, partial(read_pixels, picture)
        )
        for item in index.items
        for picture in item.centre_pictures()
    ]


def text_requests(
    texts: Mapping[str, Path | None], *, encoder: str, max_length: int, apply_mask: bool
) -> list[CacheRequest[str]]:
    """One request for each of `texts`, which are given with the folder of a picture that they belong to, if any."""
    key = partial(text_key, encoder=encoder, max_length=max_length, apply_mask=apply_mask)
    return [CacheRequest(key(text), folder, (), partial(str, text)) for text, folder in texts.items()]


def _refuse_random_crops(index: DatasetIndex) -> None:
    folders = dict.fromkeys(item.subset.image_dir for item in index.items if item.subset.random_crop)
    problems = [
        Problem(
            "random_crop cannot be used together with cache_latents", where=str(folder), hint="Turn one of them off."
        )
        for folder in folders
    ]
    if problems:
        raise UserError.many(problems, exit_code=2)


class TensorCache:
    """Entries by key. With `on_disk` they are files and are read when asked for; otherwise they stay in host memory.

    A folder that cannot be written is reported once through `warn`, and its entries stay in memory. `skip_check` takes
    existing files for whole without reading them at the start; they are checked when used all the same.
    """

    def __init__(
        self,
        kind: Literal["latents", "text"],
        *,
        on_disk: bool,
        warn: Callable[[str], None],
        skip_check: bool = False,
    ) -> None:
        self._kind = kind
        self._on_disk = on_disk
        self._warn = warn
        self._skip_check = skip_check
        self._memory: dict[str, Entry] = {}
        self._files: dict[str, Path] = {}
        self._unwritable: set[Path] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._files

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def __getitem__(self, key: str) -> Entry:
        """The entry, on the host. Raises `KeyError` when it was never filled, `UserError` when its file is damaged."""
        if key in self._memory:
            return self._memory[key]
        path = self._files[key]
        entry = _read(path, key)
        if entry is None:
            raise UserError(
                f"the cached file {path} vanished or was damaged during the run",
                hint="Start again; it is computed anew.",
            )
        return entry

    def missing(self, requests: Sequence[CacheRequest[T]]) -> list[CacheRequest[T]]:
        """The requests that nothing usable is cached for, each key once. When none are, no encoder is needed."""
        missing: dict[str, CacheRequest[T]] = {}
        unknown = [request for request in requests if request.key not in self]
        if self._on_disk:
            for request, path in zip(unknown, map_ahead(self._usable_file, unknown), strict=True):
                if path is not None:
                    self._files[request.key] = path
        for request in unknown:
            if request.key not in self:
                missing.setdefault(request.key, request)
        return list(missing.values())

    def fill(
        self,
        requests: Sequence[CacheRequest[T]],
        encode: Callable[[list[str], list[T]], Sequence[Entry]],
        *,
        batch_size: int = 1,
        progress: Progress | None = None,
        check_commands: Callable[[], object] | None = None,
    ) -> None:
        """Encodes what is missing of `requests`, up to `batch_size` of one group at once.

        `encode(keys, inputs)` gives one entry of named tensors for each input; they are copied to the host. Inputs are
        loaded in threads ahead of it. `check_commands` is called before each batch and may raise to interrupt; what
        was encoded before is kept.
        """
        missing = sorted(self.missing(requests), key=lambda request: request.group)
        done = 0
        with contextlib.closing(map_ahead(_load, missing)) as inputs:
            for batch in _batched(missing, batch_size):
                if check_commands is not None:
                    check_commands()
                keys = [request.key for request in batch]
                for request, entry in zip(batch, encode(keys, [next(inputs) for _ in batch]), strict=True):
                    self._store(request.key, request.folder, entry)
                done += len(batch)
                if progress is not None:
                    progress(done, len(missing))

    def _store(self, key: str, folder: Path | None, entry: Entry) -> None:
        # Clones: an entry may be a row of a batch, which would otherwise stay in memory as a whole.
        own = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in entry.items()}
        if self._on_disk and folder is not None and folder not in self._unwritable:
            path = self._path(folder, key)
            try:
                _write(path, key, own)
            except OSError as error:
                self._unwritable.add(folder)
                reason = (error.strerror or str(error)).lower()
                self._warn(f"{path.parent} cannot be written ({reason}); its cached {self._kind} stay in memory")
            else:
                self._files[key] = path
                return
        self._memory[key] = own

    def _usable_file(self, request: CacheRequest[T]) -> Path | None:
        if request.folder is None:
            return None
        path = self._path(request.folder, request.key)
        if not path.is_file():
            return None
        return path if self._skip_check or _read(path, request.key) is not None else None

    def _path(self, folder: Path, key: str) -> Path:
        return folder / CACHE_FOLDER / f"{self._kind}-{key}.safetensors"


def _load(request: CacheRequest[T]) -> T:
    return request.load()


def _batched(requests: Sequence[CacheRequest[T]], batch_size: int) -> Iterable[list[CacheRequest[T]]]:
    """Runs of requests of the same group, which are neighbours."""
    batch: list[CacheRequest[T]] = []
    for request in requests:
        if batch and (len(batch) == batch_size or batch[0].group != request.group):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _seal(key: str, entry: Entry) -> str:
    """The key and a checksum of everything in the entry. One value, since the order of several is not fixed."""
    value = 0
    for name in sorted(entry):
        tensor = entry[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{key} {value:08x}"


def _write(path: Path, key: str, entry: Entry) -> None:
    """Writes beside the file and renames. Not synced: a file that a power cut breaks is found and computed anew."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.write_bytes(save(entry, metadata={_SEAL: _seal(key, entry)}))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _read(path: Path, key: str) -> Entry | None:
    """The entry with one read of the file, or None when there is none or it is not what was written."""
    try:
        data = path.read_bytes()
        header_bytes = int.from_bytes(data[:8], "little")
        seal: str = json.loads(data[8 : 8 + header_bytes])["__metadata__"][_SEAL]
        entry: Entry = load(data)
        return entry if seal == _seal(key, entry) else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
