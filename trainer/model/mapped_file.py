"""Tensors out of a mapped safetensors file, one at a time.

The file is mapped, so every process that loads it uses the same pages of the system's cache. Pages are handed back as
soon as they have been copied: what a process holds while it loads is the model and what it copies at the moment, not the
model and the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trainer.schema.safetensors_header import TensorInfo

DTYPES: Final = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
)


class MappedFile:
    """One safetensors file whose header has been read and checked. Raises `OSError` when it cannot be mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data_start = 8 + int.from_bytes(self._map[:8], "little")

    def read(self, info: TensorInfo, read_as: str | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor of this header entry, in memory of its own; or its `rows` (first, end) alone.

        The bytes lie anywhere in the file; the copy is aligned, so that equal weights give equal results whatever file
        they came from. `read_as` names another type of the same width for the bytes.
        """
        shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
        tensor = torch.empty(shape, dtype=DTYPES[read_as or info.dtype])
        self.read_into(tensor, info, rows)
        return tensor

    def read_into(self, target: Tensor, info: TensorInfo, rows: tuple[int, int] | None = None) -> None:
        """Copies the bytes into `target`, a contiguous tensor in main memory that is as large."""
        start, num_bytes = info.start, info.end - info.start
        if rows is not None:
            row_bytes = num_bytes // info.shape[0]
            start, num_bytes = start + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        if num_bytes != target.nbytes:
            raise ValueError(f"{num_bytes} bytes do not fit into {target.nbytes}")
        if num_bytes:
            start += self._data_start
            source = np.frombuffer(self._map, dtype=np.uint8, count=num_bytes, offset=start)
            np.copyto(target.reshape(-1).view(torch.uint8).numpy(), source)
            self._hand_back(start, num_bytes)

    def lasting(self, info: TensorInfo) -> tuple[Tensor, Callable[[], None]]:
        """The tensor of this header entry as it lies in the file, for as long as it is used, and what gives its pages
        back after a use. It takes no memory of the process; writing to it would, and leaves the file as it is."""
        begin = self._data_start + info.start
        first = begin - begin % mmap.ALLOCATIONGRANULARITY
        with self._path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), self._data_start + info.end - first, access=mmap.ACCESS_COPY, offset=first)
        numbers = np.frombuffer(pages, dtype=np.uint8, count=info.end - info.start, offset=begin - first)
        tensor = torch.from_numpy(numbers).view(DTYPES[info.dtype]).view(info.shape)

        def hand_back() -> None:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)

        return tensor, hand_back

    def close(self) -> None:
        """Unmap the file. Tensors that were read stay valid."""
        self._map.close()

    def _hand_back(self, start: int, num_bytes: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return  # Windows trims a process's pages by itself when memory is short
        # Whole pages only; the one that the next tensor begins in is simply read again.
        first = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, start + num_bytes - first)
