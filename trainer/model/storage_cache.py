"""The stored form of a model's blocks kept on disk, so that the next start need not make it again.

One safetensors file for each model, storage and set of merged LoRAs: `<path>.weight` and `<path>.weight_scale` of every
`StoredLinear`, and in its metadata a CRC-32 of each tensor's bytes. It is named after what it was made from (the model
file's path, size and time of change, and so on), so that a changed model gets another file. It only ever saves time: what
is damaged is made again, and a disk that refuses it costs a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from trainer.model.mapped_file import MappedFile
from trainer.model.stored_linear import PackedStorage, StoredLinear
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import format_bytes
from trainer.schema.safetensors_header import Header, read_header

_VERSION: Final = 1
"""To be raised when the same model would be stored as other numbers."""
_NAMES: Final = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}
_CHECKS: Final = "crc32"


class StorageCache:
    """A folder of such files. `identity` says what was merged into the model; `tell` is told what becomes of a file."""

    def __init__(self, folder: Path, identity: Sequence[str], tell: Callable[[str], None]) -> None:
        self._folder, self._identity, self._tell = folder, tuple(identity), tell

    def open(self, header: Header, storage: PackedStorage) -> CachedWeights:
        """What is kept of this model in this form; a context manager."""
        marks: list[object] = [_VERSION, storage, self._identity]
        for path in header.files:
            found = path.stat()
            marks.append([str(path.resolve()), found.st_size, found.st_mtime_ns])
        key = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]
        return CachedWeights(self._folder / f"{header.path.stem}-{storage}-{key}.safetensors", self._tell)


class CachedWeights:
    """One file. While it is entered `take` gives what is in it; `keep` writes it anew unless all of it was good."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self._tell = path, tell
        self._file: MappedFile | None = None
        self._header: Header | None = None
        self._checks: Mapping[str, int] = {}
        self.is_whole = False
        """Whether everything that was asked for was there."""

    def __enter__(self) -> CachedWeights:
        if not self.path.exists():
            return self
        try:
            self._header = read_header(self.path)
            self._checks = {name: int(text, 16) for name, text in json.loads(self._header.metadata[_CHECKS]).items()}
            self._file = MappedFile(self.path)
            self.is_whole = True
            self._tell(f"the stored form of the model is read from {self.path}")
        except (UserError, OSError, KeyError, ValueError, AttributeError, TypeError):
            self._header = None
            self._damaged()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, name: str, linear: StoredLinear) -> tuple[Tensor, Tensor] | None:
        """The stored numbers and scales of the Linear at `name` in main memory, or None."""
        weight, scale = linear.empty("cpu")
        info = None if self._header is None else self._header.tensors.get(f"{name}.weight")
        if info is not None and linear.storage == "fp8" and info.dtype == _NAMES[torch.float8_e5m2]:
            # Of a file that has its weights in this type, and they stay as they are.
            weight = torch.empty(weight.shape, dtype=torch.float8_e5m2)
        if self._read(f"{name}.weight", weight) and self._read(f"{name}.weight_scale", scale):
            return weight, scale
        return None

    def _read(self, name: str, target: Tensor) -> bool:
        if self._file is None or self._header is None:
            return False
        info = self._header.tensors.get(name)
        fits = info is not None and (info.dtype, info.shape) == (_NAMES[target.dtype], tuple(target.shape))
        if info is not None and fits:
            self._file.read_into(target, info)
            if zlib.crc32(_bytes_of(target)) == self._checks.get(name):
                return True
        if self.is_whole:
            self.is_whole = False
            self._damaged()
        return False

    def _damaged(self) -> None:
        self._tell(f"{self.path} is damaged and is made again")

    def keep(self, linears: Mapping[str, StoredLinear]) -> None:
        """Writes the weights of all Linears, by path, through a temporary file."""
        tensors: dict[str, Tensor] = {}
        for path, linear in linears.items():
            tensors |= {f"{path}.weight": linear.weight.data, f"{path}.weight_scale": linear.weight_scale.data}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.path.parent).free < num_bytes + (1 << 26):
                self._tell(
                    f"the stored form of the model is not kept: {self.path.parent} has no room for {format_bytes(num_bytes)}"
                )
                return
            _write(partial, tensors)
            partial.replace(self.path)
            self._tell(f"the stored form of the model is kept in {self.path} ({format_bytes(num_bytes)})")
        except OSError as error:
            self._tell(f"the stored form of the model is not kept: {error}")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The file, one tensor in main memory at a time. The checks are known last and have their room from the beginning."""
    checks = dict.fromkeys(tensors, 0)
    text = _header(tensors, checks)
    with path.open("wb") as file:
        file.write(text)
        for name, tensor in tensors.items():
            data = _bytes_of(tensor.cpu())
            checks[name] = zlib.crc32(data)
            file.write(data)
        file.seek(0)
        file.write(_header(tensors, checks))
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Mapping[str, Tensor], checks: Mapping[str, int]) -> bytes:
    listed = json.dumps({name: f"{check:08x}" for name, check in checks.items()})
    content: dict[str, object] = {"__metadata__": {_CHECKS: listed}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
