"""The transformer of a run, of whichever family."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from trainer.model.chroma import Chroma
from trainer.model.flux import Flux
from trainer.model.storage_cache import StorageCache
from trainer.model.stored_linear import PackedStorage
from trainer.model.weights import ChangeOf, FileStorage, ModulationOnHost, PlaceTensor, load_chroma, load_flux

Transformer = Flux | Chroma


def load_transformer(
    path: Path,
    model_type: Literal["flux", "chroma"],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    device_of: PlaceTensor | None = None,
    storage: PackedStorage | FileStorage | None = None,
    change_of: ChangeOf | None = None,
    cache: StorageCache | None = None,
    modulation: ModulationOnHost | None = None,
) -> Transformer:
    """The transformer that `path` names; see `load_flux`. Chroma's blocks have no modulation of their own."""
    if model_type == "chroma":
        return load_chroma(path, dtype, device, device_of=device_of, storage=storage, change_of=change_of, cache=cache)
    return load_flux(
        path,
        dtype,
        device,
        device_of=device_of,
        storage=storage,
        change_of=change_of,
        cache=cache,
        modulation=modulation,
    )
