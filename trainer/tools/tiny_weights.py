"""Weights made from a seed, and the safetensors file they are stored in. Needs numpy only."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

StorageType = Literal["bf16", "f16", "f32"]
Weights: TypeAlias = dict[str, NDArray[np.float32]]

_SAFETENSORS_NAMES: Mapping[StorageType, str] = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


def write_safetensors(
    path: Path, tensors: Mapping[str, NDArray[np.float32]], *, dtype: StorageType, config: Mapping[str, object]
) -> None:
    """Write `tensors` to `path` in the safetensors format, with `config` as JSON in the metadata.

    The file appears whole or not at all: it is written beside `path` and renamed.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", "config": json.dumps(config)}}
    chunks: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        data = _to_bytes(tensors[name], dtype)
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        file.writelines(chunks)
    part.replace(path)


def _to_bytes(values: NDArray[np.float32], dtype: StorageType) -> bytes:
    values = np.ascontiguousarray(values, dtype="<f4")
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        return values.astype("<f2").tobytes()
    # bfloat16 is the upper half of a float32. Adding half of the last kept bit, less one when that bit is even,
    # rounds to nearest with ties to even. All values here are finite.
    bits = values.view("<u4")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def normal(rng: np.random.Generator, *shape: int, std: float) -> NDArray[np.float32]:
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(std)).astype(np.float32)


def zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, dtype=np.float32)


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, dtype=np.float32)


def linear(
    out: Weights,
    rng: np.random.Generator,
    name: str,
    num_in: int,
    num_out: int,
    *,
    gain: float = 1.0,
    bias: bool = True,
) -> None:
    """A Linear whose output has about `gain` times the spread of its input."""
    out[f"{name}.weight"] = normal(rng, num_out, num_in, std=gain / math.sqrt(num_in))
    if bias:
        out[f"{name}.bias"] = normal(rng, num_out, std=0.02)


def norm(out: Weights, name: str, size: int) -> None:
    out[f"{name}.weight"] = ones(size)
    out[f"{name}.bias"] = zeros(size)
