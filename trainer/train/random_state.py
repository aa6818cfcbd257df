"""The global random generators of a process, to be stored and set again.

Training seeds torch's before each micro-step from its position, so nothing that it draws depends on them; what other
packages draw may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, object]:
    """The state of Python's, NumPy's and torch's generators, that of `device` among them where it is a GPU."""
    name, keys, position, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state(legacy=True))  # noqa: NPY002
    state: dict[str, object] = {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets what `random_state` gave. A state of another kind of device leaves that of this one alone."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(cast("Tensor", state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(cast("Tensor", state["cuda"]), device)
