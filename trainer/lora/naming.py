"""Published LoRA key names: module path -> name -> key, and back from a key to its name and part.

Source of the names: the key patterns that the public FLUX.1 LoRA files and their loaders agree on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from torch import Tensor

Component = Literal["unet", "te1", "te3"]
"""FLUX, CLIP-L and T5. There is no te2: ComfyUI keeps that name for another model's encoder."""

PARTS: Final = ("alpha", "lora_down.weight", "lora_up.weight", "dora_scale")
CLIP_ROOT: Final = "text_model."

_OFT_BLOCKS = re.compile(r"(oft_unet_.+)\.(alpha|oft_blocks\.\d+)")


def published_name(component: Component, path: str, kind: Literal["lora", "oft"] = "lora") -> str:
    """The name of one adapted Linear.

    `path` is the dotted module path inside the transformer (`unet`), CLIP-L (`te1`) or T5 (`te3`). Newer transformers
    releases have dropped the `text_model.` root from CLIP's module paths; published names keep it.
    """
    if component == "te1":
        path = CLIP_ROOT + path.removeprefix(CLIP_ROOT)
    return f"{kind}_{component}_{path.replace('.', '_')}"


def published_key(name: str, part: str) -> str:
    """The key of one tensor of the adapter called `name`."""
    return f"{name}.{part}"


def layers_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file of this format by layer: name -> part -> tensor. Other keys are left out."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        split = split_key(key)
        if split is not None:
            layers.setdefault(split[0], {})[split[1]] = tensor
    return layers


def split_key(key: str) -> tuple[str, str] | None:
    """The adapter's name and the part that `key` stands for, or None when it is no key of this format."""
    found = _OFT_BLOCKS.fullmatch(key)
    if found is not None:
        return found[1], found[2]
    for part in PARTS:
        name = key.removesuffix(f".{part}")
        if name != key and name.startswith("lora_"):
            return name, part
    return None


def foreign_format(keys: Iterable[str]) -> str | None:
    """What kind of LoRA file the keys belong to when they are not of this format; None when that can't be told."""
    for key in keys:
        if ".lora_A." in key or ".lora_B." in key:
            return "a diffusers (PEFT) LoRA"
        if ".lora.down." in key or ".lora.up." in key:
            return "an old diffusers LoRA"
        if ".hada_" in key or ".lokr_" in key or ".dora_scale" in key:
            return "a LyCORIS file"
        if ".oft_" in key:
            return "an OFT file"
    return None
