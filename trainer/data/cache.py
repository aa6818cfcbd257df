"""What an encoder makes of pictures and captions, computed once: in memory, or on disk beside the pictures.

Files are found by what went into them, so an edited caption, a replaced picture or another encoder never meets an old
result. The reference trainer names its files after the picture alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeAlias, TypeVar

from torch import Tensor

from trainer.data.ahead import map_ahead
from trainer.data.buckets import centre_crop
from trainer.data.cache_files import KEY_DIGITS, Entry, entry_path, mark_used, read_entry, write_entry
from trainer.data.images import read_pixels
from trainer.data.items import DatasetIndex, Progress
from trainer.data.masks import read_mask
from trainer.data.pictures import Mask, Picture
from trainer.schema.base import Problem, UserError
from trainer.schema.options_data import CHANGES_PIXELS

T = TypeVar("T")
PictureOrMask = TypeVar("PictureOrMask", Picture, Mask)
FORMAT_VERSION = 2
"""Part of every key; raised when the same inputs begin to give another result."""


Encode: TypeAlias = Callable[[list[str], list[T]], Sequence[Entry]]
"""Computes the entries of some inputs, given with their keys."""


@dataclass(frozen=True)
class CacheRequest(Generic[T]):
    """One entry that training will need. `load` gives the encoder's input; requests of one `group` may share a batch.

    `folder` is where the picture lies; None keeps the entry in memory.
    """

    key: str
    folder: Path | None
    group: tuple[int, ...]
    load: Callable[[], T]


def latent_key(picture: Picture, *, encoder: str) -> str:
    """The key of a picture's latents. `encoder` says which autoencoder, in which precision."""
    return content_key(
        "latents",
        *picture.identity,
        encoder,
    )


def text_key(caption: str, *, encoder: str, max_length: int, apply_mask: bool) -> str:
    """The key of a caption's encodings. `encoder` says which text encoders and tokenizers, in which precision."""
    return content_key("text", caption, encoder, max_length, apply_mask)


def content_key(*parts: object) -> str:
    """One name for all of `parts`, which are what JSON can write."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()[:KEY_DIGITS]


def latent_requests(index: DatasetIndex, *, encoder: str) -> list[CacheRequest[Tensor]]:
    """Every picture to encode, both ways round where it may be flipped; `load` gives (3, height, width).

    Raises `UserError` for subsets with random crops or colours: there is no end of them.
    """
    for name in CHANGES_PIXELS:
        _refuse(index, name)
    return [
        CacheRequest(
            latent_key(picture, encoder=encoder),
            picture.path.parent,
            picture.bucket,
            partial(read_unchanged, picture, read_pixels),
        )
        for picture in (
            *(picture for item in index.items for picture in item.centre_pictures()),
            *(item.picture(centre_crop(item.fit), is_flipped=False) for item in index.validation),
        )
    ]


def mask_key(mask: Mask) -> str:
    """The key of a mask at the size of the latents."""
    return content_key("mask", *mask.identity)


def mask_requests(index: DatasetIndex) -> list[CacheRequest[Tensor]]:
    """The masks of all pictures in `latent_requests`; `load` gives (h, w)."""
    return [
        CacheRequest(mask_key(mask), mask.path.parent, mask.bucket, partial(read_unchanged, mask, read_mask))
        for item in (*index.items, *index.validation)
        for mask in item.centre_masks()
    ]


def read_unchanged(source: PictureOrMask, read: Callable[[PictureOrMask], Tensor]) -> Tensor:
    """What `read` makes of the file. An entry made from other bytes than its key names would be wrong for ever after."""
    values = read(source)
    if hashlib.sha256(source.path.read_bytes()).hexdigest() != source.digest:
        raise UserError(f"{source.path} was changed after the start of the run", hint="Start again.")
    return values


def text_requests(
    texts: Mapping[str, Path | None], *, encoder: str, max_length: int, apply_mask: bool
) -> list[CacheRequest[str]]:
    """One request for each of `texts`, which are given with the folder of a picture that they belong to, if any."""
    key = partial(text_key, encoder=encoder, max_length=max_length, apply_mask=apply_mask)
    return [CacheRequest(key(text), folder, (), partial(str, text)) for text, folder in texts.items()]


def _refuse(index: DatasetIndex, name: str) -> None:
    folders = dict.fromkeys(item.subset.place for item in index.items if getattr(item.subset, name))
    problems = [
        Problem(f"{name} cannot be used together with cache_latents", where=str(folder), hint="Turn one of them off.")
        for folder in folders
    ]
    if problems:
        raise UserError.many(problems, exit_code=2)


class TensorCache:
    """Entries by key. With `on_disk` they are files and are read when asked for; otherwise they stay in host memory.

    Several processes may fill one folder: each takes over what another one has written meanwhile. A folder that cannot be
    written is reported once through `warn`, and its entries stay in memory. `skip_check` takes existing files for whole
    without reading them at the start; they are checked when used all the same.
    """

    def __init__(
        self,
        kind: Literal["latents", "masks", "text"],
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
        self._recover: Callable[[list[str]], None] | None = None
        self._recovering = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._files

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def __getitem__(self, key: str) -> Entry:
        """The entry, on the host. Raises `KeyError` when it was never filled.

        One whose file vanished or was damaged is computed anew if the cache knows how, else it is a `UserError`.
        """
        entry = self._get(key)
        if entry is None and self._recover is not None:
            # One of the threads that read ahead computes everything that is gone; the others wait for it.
            with self._recovering:
                entry = self._get(key)
                if entry is None:
                    self._recover_lost(key, self._recover)
                    entry = self._get(key)
        if entry is None:
            raise UserError(
                f"the cached file {self._files[key]} vanished or was damaged during the run",
                hint="Start again; it is computed anew.",
            )
        return entry

    def recover_with(self, requests: Sequence[CacheRequest[T]], load_encoder: Callable[[], Encode[T]]) -> None:
        """From now on entries of `requests` that get lost are computed anew, one by one.

        `load_encoder` is called each time that some were lost, from any thread, while a step is waiting for them.
        """
        by_key = {request.key: request for request in requests}

        def recover(keys: list[str]) -> None:
            encode = load_encoder()
            for request in (by_key[key] for key in keys):
                (entry,) = encode([request.key], [request.load()])
                self.store(request, entry)

        self._recover = recover

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
        encode: Encode[T],
        *,
        batch_size: int = 1,
        progress: Progress | None = None,
        check_commands: Callable[[], object] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Encodes what is missing of `requests`, up to `batch_size` of one group at once.

        With `share` (process, number of processes) each of several that fill one folder begins at another place and takes
        over what the others have done by the time that it gets there.

        `encode(keys, inputs)` gives one entry of named tensors for each input; they are copied to the host. Inputs are
        loaded in threads ahead of it. `check_commands` is called before each batch and may raise to interrupt; what
        was encoded before is kept.
        """
        batches = list(_batched(sorted(self.missing(requests), key=lambda request: request.group), batch_size))
        begin = len(batches) * share[0] // share[1]
        batches = batches[begin:] + batches[:begin]
        missing = [request for batch in batches for request in batch]
        done = 0
        with contextlib.closing(map_ahead(self._load_missing, missing)) as inputs:
            for batch in batches:
                if check_commands is not None:
                    check_commands()
                loaded = [(request, next(inputs)) for request in batch]
                # Another process that fills the same folder may have been faster.
                wanted = [
                    (request, given[0])
                    for request, given in loaded
                    if given is not None and not self._takes_over(request)
                ]
                if wanted:
                    entries = encode([request.key for request, _ in wanted], [value for _, value in wanted])
                    for (request, _), entry in zip(wanted, entries, strict=True):
                        self.store(request, entry)
                done += len(batch)
                if progress is not None:
                    progress(done, len(missing))

    def store(self, request: CacheRequest[T], entry: Entry) -> None:
        """Keeps the entry of a request, on disk where it belongs there."""
        # Clones: an entry may be a row of a batch, which would otherwise stay in memory as a whole.
        own = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in entry.items()}
        key, folder = request.key, request.folder
        if self._on_disk and folder is not None and folder not in self._unwritable:
            path = entry_path(folder, self._kind, key)
            try:
                write_entry(path, key, own)
            except OSError as error:
                self._unwritable.add(folder)
                reason = (error.strerror or str(error)).lower()
                self._warn(f"{path.parent} cannot be written ({reason}); its cached {self._kind} stay in memory")
            else:
                self._files[key] = path
                return
        self._memory[key] = own

    def _get(self, key: str) -> Entry | None:
        if key in self._memory:
            return self._memory[key]
        return read_entry(self._files[key], key)

    def _recover_lost(self, key: str, recover: Callable[[list[str]], None]) -> None:
        gone = [each for each, path in self._files.items() if each != key and not path.is_file()]
        self._warn(
            f"{len(gone) + 1} cached {self._kind} vanished or were damaged during the run, such as "
            f"{self._files[key]}; they are computed anew, which takes time"
        )
        recover([key, *gone])

    def _load_missing(self, request: CacheRequest[T]) -> tuple[T] | None:
        """The encoder's input; None where another process has made the entry meanwhile."""
        return None if self._takes_over(request) else (request.load(),)

    def _takes_over(self, request: CacheRequest[T]) -> bool:
        path = self._usable_file(request) if self._on_disk else None
        if path is not None:
            self._files[request.key] = path
        return path is not None

    def _usable_file(self, request: CacheRequest[T]) -> Path | None:
        if request.folder is None:
            return None
        path = entry_path(request.folder, self._kind, request.key)
        if not path.is_file() or not (self._skip_check or read_entry(path, request.key) is not None):
            return None
        mark_used(path)
        return path


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
