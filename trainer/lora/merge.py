"""Merging a LoRA file into a model's weights (`base_weights`): W + multiplier * (W' - W), as a loader would apply it.

O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from trainer.lora.adapter import Adapter
from trainer.lora.naming import Component, layers_of, published_name
from trainer.lora.oft import rotated_weight
from trainer.lora.split import part_slices, read_as_trained
from trainer.schema.base import UserError
from trainer.schema.network_args import fused_parts

WeightChange = Callable[[Tensor], Tensor]
"""A weight (O, I) in float32 -> the merged one."""


def merge_file(
    models: Mapping[Component, nn.Module],
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    multiplier: float,
    where: str,
    *,
    stored_are_merged: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Merges what the file has for `models`, and gives the number of changed layers and the names that none has.

    The sum is formed in float32 and rounded to the weight's type once. Weights that are stored in 8 bit or less cannot be
    changed without losing most of a small change; with `stored_are_merged` those were merged before they were stored, by
    `weight_change`, and are only counted. Names of components that are not among `models` are not counted as unknown.
    Raises `UserError` for a file of another kind, or for another model.
    """
    layers = _layers(state, metadata, where)
    linears = {name: linear for component, model in models.items() for name, linear in _named(model, component)}
    own = [name for name in layers if name.split("_")[1] in models]
    for name in own:
        if name in linears:
            weight = linears[name].weight.data
            if weight.dtype.itemsize == 1:
                if not stored_are_merged:
                    raise _wrong("a LoRA cannot be merged into weights that are kept in 8 bit", where)
                continue
            weight.copy_(_merged(weight.float(), layers[name], name, multiplier, where))
    return sum(name in linears for name in own), tuple(name for name in own if name not in linears)


def weight_change(
    component: Component, state: Mapping[str, Tensor], metadata: Mapping[str, str], multiplier: float, where: str
) -> Callable[[str], WeightChange | None]:
    """For the path of a Linear in a model, what `merge_file` would make of its weight; None where the file has nothing."""
    layers = _layers(state, metadata, where)

    def change_of(path: str) -> WeightChange | None:
        for kind in ("lora", "oft"):
            name = published_name(component, path, kind)
            if name in layers:
                return partial(_merged, tensors=layers[name], name=name, multiplier=multiplier, where=where)
        return None

    return change_of


def _layers(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> Mapping[str, Mapping[str, Tensor]]:
    layers, _ = read_as_trained(layers_of(state), metadata)
    if not layers:
        raise _wrong("this is no LoRA of a kind that can be merged", where)
    return layers


def _merged(weight: Tensor, tensors: Mapping[str, Tensor], name: str, multiplier: float, where: str) -> Tensor:
    return weight.lerp(changed_weight(weight, tensors, name, where), multiplier)


def components_of(state: Mapping[str, Tensor]) -> frozenset[str]:
    """Which of `unet`, `te1` and `te3` a file has layers for."""
    return frozenset(name.split("_")[1] for name in layers_of(state))


def changed_weight(weight: Tensor, tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """W' in float32 on the weight's device."""
    parts = {part: tensor.to(weight.device, torch.float32) for part, tensor in tensors.items()}
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    if "oft_blocks.0" in parts:
        sizes = fused_parts(name, weight.shape[1], weight.shape[0])
        blocks = [parts[f"oft_blocks.{index}"] for index in range(len(sizes)) if f"oft_blocks.{index}" in parts]
        if [block.shape[0] * block.shape[-1] for block in blocks] != list(sizes) or alpha is None:
            raise _wrong(f"the OFT blocks of {name} do not fit this model", where)
        return rotated_weight(weight, blocks, alpha, part_slices(sizes))
    if "lora_down.weight" not in parts or "lora_up.weight" not in parts:
        raise _wrong(f"{name} is incomplete", where)
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    if (up.shape[0], down.shape[1]) != tuple(weight.shape):
        raise _wrong(f"{name} is for a layer of {[up.shape[0], down.shape[1]]}, not {list(weight.shape)}", where)
    rank = down.shape[0]
    changed = weight.addmm(up, down, alpha=(rank if alpha is None else alpha) / rank)
    if "dora_scale" in parts:
        scale = parts["dora_scale"]
        changed = changed * scale / changed.norm(dim=1 if scale.shape[0] == weight.shape[0] else 0, keepdim=True)
    return changed


def _named(model: nn.Module, component: Component) -> list[tuple[str, nn.Linear]]:
    found: list[tuple[str, nn.Linear]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found += [(published_name(component, path, kind), module) for kind in ("lora", "oft")]
        elif isinstance(module, Adapter):
            raise ValueError("merge before adapters are attached")
    return found


def _wrong(what: str, where: str) -> UserError:
    return UserError(
        what, where, "Give LoRAs for this model, as sd-scripts writes them.", field="base_weights", exit_code=3
    )
