"""The header of a safetensors file: which tensors it holds, in which type and shape, and where they lie.

A safetensors file starts with the header's length (8 bytes, little endian) and the header, a JSON object that gives each
tensor's type, shape and place. Reading it takes milliseconds for a file of any size and needs neither torch nor
safetensors, so the interface and the checks before a run can say what a file is, and that it is whole.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from trainer.schema.base import UserError

MAX_HEADER_BYTES: Final = 100_000_000

_DTYPE_BITS: Final[Mapping[str, int]] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are byte offsets counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file, or the headers of a model's shards together.

    `path` is what was given. `shards` names each tensor's own file where that is another one. `file_bytes` counts all
    files.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_bytes: int
    shards: Mapping[str, Path] = field(default_factory=dict[str, Path])

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor `name`."""
        return self.shards.get(name, self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """The model's files, each once, in the order of their names."""
        return tuple(sorted(set(self.shards.values()))) if self.shards else (self.path,)


_USE_SAFETENSORS: Final = "Use the .safetensors file of the model."
_FOREIGN_FORMATS: Final[tuple[tuple[bytes | tuple[bytes, ...], str, str], ...]] = (
    (
        b"version https://git-lfs",
        "this is a Git LFS pointer, not the model itself",
        "Run `git lfs pull` in its folder, or download the file from the model's page.",
    ),
    (b"GGUF", "this is a GGUF file; GGUF is not supported", _USE_SAFETENSORS),
    # A zip with the pickle inside since PyTorch 1.6, the bare pickle before.
    (
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "this is a PyTorch pickle file (.ckpt, .pt, .bin); pickle files are not loaded, since they can run any code",
        _USE_SAFETENSORS,
    ),
    (b"\x89HDF\r\n\x1a\n", "this is an HDF5 file, not a safetensors file", _USE_SAFETENSORS),
    ((b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"Rar!"), "this is a packed archive, not a model", "Unpack it first."),
    (
        (b"\x89PNG", b"\xff\xd8\xff", b"RIFF"),
        "this is a picture, not a model",
        "Give the path of the model's .safetensors file.",
    ),
)


def read_header(path: Path) -> Header:
    """Read and check the header of `path`.

    Raises `UserError` (exit code 3) when the file is missing, is not safetensors, or does not hold all of its data.
    """
    where = str(path)
    try:
        if path.is_dir():
            raise UserError("this is a folder, not a model file", where, "Give the path of one .safetensors file.")
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            start = file.read(64)
            header_bytes = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if start[8:9] != b"{" or not 2 <= header_bytes <= MAX_HEADER_BYTES:
                what, hint = _foreign_format(start, file_bytes)
                raise UserError(what, where, hint)
            if 8 + header_bytes > file_bytes:
                raise _truncated(where, file_bytes, None)
            file.seek(8)
            text = file.read(header_bytes)
    except FileNotFoundError:
        raise UserError("this file does not exist", where, "Check the path for a typing error.") from None
    except OSError as error:
        raise UserError(
            f"this file cannot be read ({error.strerror or error})", where, "Check the path and its permissions."
        ) from None
    tensors, metadata = _parse_header(text, where)
    _check_layout(tensors, 8 + header_bytes, file_bytes, where)
    return Header(path=path, tensors=tensors, metadata=metadata, file_bytes=file_bytes)


def _foreign_format(start: bytes, file_bytes: int) -> tuple[str, str]:
    """What a file is that begins with `start` and is not safetensors, and what to do about it."""
    if start == b"":
        return "this file is empty", "Download it again."
    if not start.strip(b"\0"):
        return (
            f"this file begins with {len(start)} or more zero bytes: its download never finished",
            "Download it again.",
        )
    for marks, what, hint in _FOREIGN_FORMATS:
        if start.startswith(marks):
            return what, hint
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        return (
            "this is a web page, not a model",
            "The download went to a log-in or licence page; download it again after signing in.",
        )
    if text[:1] in (b"{", b"["):
        return "this is a JSON text, not a model", "Give the .safetensors file that belongs to it."
    if start[8:9] == b"{":
        length = struct.unpack("<Q", start[:8])[0]
        return (
            f"this is not a safetensors file: its header would be {length} bytes long, the file has {file_bytes}",
            "The file is damaged; download it again.",
        )
    return (
        "this is not a safetensors file",
        "Give a file in the .safetensors format; if it should be one, download it again.",
    )


def _truncated(where: str, file_bytes: int, needed_bytes: int | None) -> UserError:
    whole = f"{file_bytes} of {needed_bytes} bytes" if needed_bytes else f"only {file_bytes} bytes, part of its header"
    return UserError(f"this file is not complete: it holds {whole}", where, "Download it again.")


def _parse_header(text: bytes, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    damaged = UserError("the header of this safetensors file is damaged", where, "Download it again.")
    try:
        parsed: object = json.loads(text, object_pairs_hook=_without_repeats)
    except _RepeatedNameError as error:
        raise UserError(
            f"the header of this safetensors file is damaged: it lists {error} twice", where, "Download it again."
        ) from None
    except (ValueError, RecursionError):
        raise UserError(
            "the header of this safetensors file is damaged: it is not JSON", where, "Download it again."
        ) from None
    if not isinstance(parsed, dict):
        raise damaged
    entries = cast("dict[str, object]", parsed)
    stored_metadata = entries.pop("__metadata__", {})
    if not isinstance(stored_metadata, dict):
        raise damaged
    metadata = {
        key: value for key, value in cast("dict[str, object]", stored_metadata).items() if isinstance(value, str)
    }
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        info = _tensor_info(entry)
        if info is None:
            raise UserError(f"the header entry of the tensor {name!r} is damaged", where, "Download the file again.")
        tensors[name] = info
    return tensors, metadata


class _RepeatedNameError(ValueError):
    """A JSON object has two entries of one name."""


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(repr(next(name for name in names if names.count(name) > 1)))
    return values


def _tensor_info(entry: object) -> TensorInfo | None:
    """The checked form of one header entry, None when its parts are missing or contradict each other."""
    if not isinstance(entry, dict):
        return None
    fields = cast("dict[str, object]", entry)
    dtype = fields.get("dtype")
    shape = read_sizes(fields.get("shape"))
    offsets = read_sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        return None
    start, end = offsets
    bits = _DTYPE_BITS.get(dtype)
    if bits is None or start > end or (end - start) * 8 != math.prod(shape) * bits:
        return None
    return TensorInfo(dtype=dtype, shape=shape, start=start, end=end)


def read_sizes(value: object) -> tuple[int, ...] | None:
    """`value` as a tuple when it is a list of non-negative integers."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    sizes = tuple(item for item in items if type(item) is int and item >= 0)
    return sizes if len(sizes) == len(items) else None


def _check_layout(tensors: Mapping[str, TensorInfo], data_start: int, file_bytes: int, where: str) -> None:
    """Tensors must fill the rest of the file, one after the other, with no gap and no overlap."""
    position, previous = 0, ""
    for name, info in sorted(tensors.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        if info.start != position:
            fault = f"{name!r} and {previous!r} overlap" if info.start < position else f"there is a gap before {name!r}"
            raise UserError(
                f"the header of this safetensors file is damaged: {fault}", where, "Download the file again."
            )
        position, previous = info.end, name
    if data_start + position > file_bytes:
        raise _truncated(where, file_bytes, data_start + position)
    if data_start + position < file_bytes:
        extra = file_bytes - data_start - position
        raise UserError(f"this file holds {extra} bytes more than its header lists", where, "Download it again.")
