"""LoRAs of the parts of a fused Linear (`split_qkv`): their one form in a file, and the older files with a wrong alpha.

In a file the parts are one LoRA of rank P * R: the downs stacked, the ups on the diagonal of one large up. sd-scripts
saves that with the alpha of a single part, so that every loader, which divides by the rank in the file, applies it at
1 / P of the trained strength. Files written here have P times the alpha. P parts, R rank, I in and O out features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, cast

import torch
from torch import Tensor

from trainer.schema.network_args import SWITCHED_ON, fused_parts

SPLIT_ALPHA_KEY: Final = "ss_split_qkv_alpha"
"""Metadata key of files whose split layers have the alpha that belongs to their rank; its value is `MERGED`."""
MERGED: Final = "merged"


def part_slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    """The rows of each part."""
    slices: list[slice] = []
    start = 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return tuple(slices)


def merge_up(up: Tensor, parts: Sequence[slice]) -> Tensor:
    """(O, R) -> (O, P * R), each part's rows in columns of their own."""
    if len(parts) == 1:
        return up
    rank = up.shape[1]
    merged = up.new_zeros(up.shape[0], rank * len(parts))
    for index, part in enumerate(parts):
        merged[part, index * rank : (index + 1) * rank] = up[part]
    return merged


def unmerge_up(merged: Tensor, parts: Sequence[slice]) -> Tensor | None:
    """(O, P * R) -> (O, R); None when there is anything beside the diagonal blocks."""
    if len(parts) == 1:
        return merged
    if merged.shape[1] % len(parts) or merged.shape[0] != parts[-1].stop:
        return None
    rank = merged.shape[1] // len(parts)
    up = torch.cat([merged[part, index * rank : (index + 1) * rank] for index, part in enumerate(parts)])
    return up if torch.equal(merge_up(up, parts), merged) else None


def read_as_trained(
    layers: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str] | None
) -> tuple[dict[str, Mapping[str, Tensor]], int]:
    """The layers of a file with the alpha that they were trained with, and how many had to be corrected.

    `layers` maps a published name to its parts. A file of ours says so in its metadata. Otherwise it is an older split
    file when its fused layers are block-diagonal and either the metadata name split_qkv, or, as metadata get lost, the
    fused layers have the very alpha of the file's other layers, which every layer of one training shares.
    """
    split = {name: count for name, tensors in layers.items() if (count := num_own_parts(name, tensors)) > 1}
    # Zeros, as an untrained file has them, are block-diagonal too; one layer that is not must be there to tell.
    is_told = any(bool(layers[name]["lora_up.weight"].any()) for name in split)
    metadata = metadata or {}
    if not split or metadata.get(SPLIT_ALPHA_KEY) == MERGED:
        return dict(layers), 0
    named = _names_split(metadata)
    if not (named or (is_told and _shares_alpha(layers, split))):
        return dict(layers), 0
    corrected = dict(layers)
    for name, count in split.items():
        if "alpha" in layers[name]:
            corrected[name] = {**layers[name], "alpha": layers[name]["alpha"] * count}
    return corrected, len(split)


def is_block_diagonal(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether this fused layer was trained in parts."""
    return num_own_parts(name, tensors) > 1 and bool(tensors["lora_up.weight"].any())


def num_own_parts(name: str, tensors: Mapping[str, Tensor]) -> int:
    """The number of parts of a fused layer whose up is block-diagonal, as zeros are too; 1 for every other layer."""
    down, up = tensors.get("lora_down.weight"), tensors.get("lora_up.weight")
    if down is None or up is None or down.dim() != 2 or up.dim() != 2:
        return 1
    parts = part_slices(fused_parts(name, down.shape[1], up.shape[0]))
    return len(parts) if len(parts) > 1 and unmerge_up(up, parts) is not None else 1


def _names_split(metadata: Mapping[str, str]) -> bool:
    try:
        arguments = cast("object", json.loads(metadata.get("ss_network_args", "{}")))
    except ValueError:
        return False
    if not isinstance(arguments, dict):
        return False
    value = cast("dict[str, object]", arguments).get("split_qkv")
    # Only "True" switched it on in the program that wrote such files.
    return str(value).lower() in SWITCHED_ON and value != "true" and value != "1"


def _shares_alpha(layers: Mapping[str, Mapping[str, Tensor]], split: Mapping[str, int]) -> bool:
    alphas = {name: float(tensors["alpha"]) for name, tensors in layers.items() if "alpha" in tensors}
    others = {alpha for name, alpha in alphas.items() if name not in split}
    return len(others) == 1 and {alpha for name, alpha in alphas.items() if name in split} == others
