"""Merges LoRAs into a FLUX model's file, tensor by tensor: no more than one weight is in memory."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trainer.lora.merge import changed_weight
from trainer.lora.naming import published_name
from trainer.lora.runtime import LoraLayers
from trainer.model.mapped_file import DTYPES
from trainer.model.weights import read_planned
from trainer.schema.base import UserError
from trainer.schema.key_plans import PlannedTensor, flux_plan
from trainer.schema.model_check import check_kind
from trainer.schema.weight_files import read_weights
from trainer.tools.lora_files import Progress
from trainer.train.checkpoint import explain_disk

_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_WIDE: Final = (torch.float32, torch.float16, torch.bfloat16)
_ALIGNMENT: Final = 8


def merge_into_model(
    model: Path,
    loras: Sequence[tuple[LoraLayers, float]],
    target: Path,
    *,
    dtype: torch.dtype | None,
    progress: Progress,
) -> int:
    """Writes the model with every LoRA merged at its ratio to `target`; gives the number of changed layers.

    The result has the published FLUX names, whatever layout the model had. `dtype` None keeps each tensor's own type,
    and makes bf16 of 8-bit ones, whose scales are gone. Sums are formed in float32 and rounded once. The file appears
    whole or not at all. Raises `UserError` when a LoRA has layers that the model has not.
    """
    header = read_weights(model, "flux")
    problem = check_kind(header, "flux", "model")
    if problem is not None:
        raise UserError(problem.what, problem.where, "Give a FLUX.1 model.")
    plan = sorted(flux_plan(header), key=lambda planned: planned.target)
    _check_layers(plan, loras, model)
    types = {planned.target: _type_of(planned, dtype) for planned in plan}
    entries: dict[str, object] = {"__metadata__": dict(header.metadata)}
    position = 0
    for planned in plan:
        size = types[planned.target].itemsize * int(torch.Size(planned.shape).numel())
        entries[planned.target] = {
            "dtype": _NAMES[types[planned.target]],
            "shape": list(planned.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    num_changed = 0
    try:
        with explain_disk(target, 8 + len(text) + position):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for number, planned in enumerate(plan):
                    progress(number, len(plan), planned.target)
                    tensor, is_changed = _merged(read_planned(header, [planned])[planned.target], planned, loras)
                    num_changed += is_changed
                    _write(file.fileno(), tensor.to(types[planned.target]))
                os.fsync(file.fileno())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return num_changed


def _write(descriptor: int, tensor: Tensor) -> None:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    while data:
        data = data[os.write(descriptor, data) :]


def _type_of(planned: PlannedTensor, wanted: torch.dtype | None) -> torch.dtype:
    stored = DTYPES[planned.pieces[0].info.dtype]
    if wanted is None:
        return stored if stored in _WIDE else torch.bfloat16
    # Norms and biases are small, and coarse in 8 bit.
    return wanted if wanted in _WIDE or len(planned.shape) == 2 else torch.bfloat16


def _merged(weight: Tensor, planned: PlannedTensor, loras: Sequence[tuple[LoraLayers, float]]) -> tuple[Tensor, bool]:
    path = planned.target.removesuffix(".weight")
    names = [published_name("unet", path, kind) for kind in ("lora", "oft")]
    is_changed = False
    for lora, ratio in loras:
        for name in names:
            if planned.target.endswith(".weight") and name in lora.layers:
                before = weight.float()
                weight = before.lerp(changed_weight(before, lora.layers[name], name, str(lora.path)), ratio)
                is_changed = True
    return weight, is_changed


def _check_layers(plan: Sequence[PlannedTensor], loras: Sequence[tuple[LoraLayers, float]], model: Path) -> None:
    known = {
        published_name("unet", planned.target.removesuffix(".weight"), kind)
        for planned in plan
        for kind in ("lora", "oft")
    }
    for lora, _ in loras:
        own = [name for name in lora.layers if name.split("_")[1] == "unet"]
        strange = [name for name in own if name not in known]
        if strange or not own:
            what = f"{len(strange)} layers are not in this model ({strange[0]})" if strange else "no layer is for FLUX"
            raise UserError(f"{what}: {lora.path.name}", str(model), "Give the model that the LoRA was made for.")
