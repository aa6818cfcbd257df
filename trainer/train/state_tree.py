"""Nested Python values as JSON and named tensors, and back, bit for bit: how optimizers and generators are stored.

Pickle is not used: reading such a file could run code. In JSON a container is an object with one key that names its
kind: {"list": [...]}, {"tuple": [...]}, {"dict": [[key, value], ...]}, {"tensor": name}, {"dtype": "float32"},
{"float": "nan"}; text, whole numbers, finite numbers, true, false and null stand for themselves.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

_SCALARS: Final = (str, int, bool, type(None))


def pack(value: object, prefix: str = "") -> tuple[object, dict[str, Tensor]]:
    """`value` as JSON, and its tensors on the host by the names that the JSON has for them. All are copies.

    Raises `ValueError` for what has no form, such as a set or an object of a class of its own.
    """
    tensors: dict[str, Tensor] = {}

    def walk(part: Any, path: str) -> object:
        if isinstance(part, Tensor):
            # A copy of each: safetensors refuses tensors that share memory, and training goes on meanwhile.
            tensors[path] = part.detach().to("cpu", copy=True).contiguous()
            return {"tensor": path}
        if isinstance(part, np.generic):
            return walk(part.item(), path)
        if isinstance(part, _SCALARS):
            return part
        if isinstance(part, float):
            return part if math.isfinite(part) else {"float": str(part)}
        if isinstance(part, torch.dtype):
            return {"dtype": str(part).removeprefix("torch.")}
        if isinstance(part, Mapping):
            entries = cast("Mapping[object, object]", part).items()
            return {"dict": [[_key(key, path), walk(inner, f"{path}.{key}")] for key, inner in entries]}
        if isinstance(part, (list, tuple, deque)):
            inner = [walk(item, f"{path}.{index}") for index, item in enumerate(cast("list[object]", part))]
            return {"tuple" if isinstance(part, tuple) else "list": inner}
        raise ValueError(f"{path.removeprefix('.')} is a {type(part).__name__}, which a state has no form for")

    return walk(value, prefix), tensors


def unpack(tree: object, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` was given. Its tensors are those of `tensors`, not copies.

    Raises `ValueError` for what `pack` cannot have written, and for a tensor that is missing.
    """
    if isinstance(tree, (*_SCALARS, float)):
        return tree
    if not isinstance(tree, dict) or len(cast("dict[str, object]", tree)) != 1:
        raise ValueError("this is no part of a state")
    ((kind, content),) = cast("dict[str, Any]", tree).items()
    match kind:
        case "tensor":
            if content not in tensors:
                raise ValueError(f"the tensor {content} is missing")
            return tensors[content]
        case "float":
            return float(content)
        case "dtype":
            dtype = getattr(torch, str(content), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{content} is no number format")
            return dtype
        case "list":
            return [unpack(part, tensors) for part in content]
        case "tuple":
            return tuple(unpack(part, tensors) for part in content)
        case "dict":
            return {key: unpack(part, tensors) for key, part in content}
        case _:
            raise ValueError(f"{kind} is no part of a state")


def _key(key: object, path: str) -> object:
    if not isinstance(key, (str, int)):
        raise ValueError(f"{path.removeprefix('.')} has the key {key!r}, which a state has no form for")
    return key
