"""Published LoRA key names: module path -> name -> key, and back from a key to its name and part.

Source of the names: the key patterns that the public FLUX.1 LoRA files and their loaders agree on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Part = Literal["lora_down.weight", "lora_up.weight", "alpha"]
Component = Literal["unet", "te1"]

PARTS: tuple[Part, ...] = ("alpha", "lora_down.weight", "lora_up.weight")

_CLIP_ROOT = "text_model."


def published_name(component: Component, path: str) -> str:
    """The name of one adapted Linear.

    `path` is the dotted module path inside the transformer (`unet`) or inside CLIP-L (`te1`). Newer transformers
    releases have dropped the `text_model.` root from CLIP's module paths; published names keep it.
    """
    if component == "te1":
        path = _CLIP_ROOT + path.removeprefix(_CLIP_ROOT)
    return f"lora_{component}_{path.replace('.', '_')}"


def published_key(name: str, part: Part) -> str:
    """The key of one tensor of the adapter called `name`."""
    return f"{name}.{part}"


def split_key(key: str) -> tuple[str, Part] | None:
    """The adapter's name and the part that `key` stands for, or None when it is no key of this format."""
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
