"""Where a tensor of a LoRA file belongs, whatever form the file has, and the keys that each form gives it.

The forms, as their own loaders define them: kohya-ss/sd-scripts (`networks/lora_flux.py`), diffusers and ai-toolkit
(`FluxLoraLoaderMixin`), Black Forest Labs' control LoRAs (`flux/modules/lora.py`), XLabs-AI/x-flux (its processors).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from trainer.lora.layer_names import (
    diffusers_modules,
    diffusers_norm,
    is_flux_path,
    is_norm_path,
    layer_of,
    published_of_module,
    published_of_norm,
)
from trainer.lora.naming import published_name

Form = Literal["sd-scripts", "diffusers", "bfl", "xlabs"]
Role = Literal["down", "up", "alpha", "bias", "magnitude"]

QKV_OF_LINEAR1: Final = -1
"""The part of a single block's linear1 that XLabs knows: q, k and v, without the MLP."""

_DIFFUSERS_PREFIX: Final = "transformer."
_PREFIXES: Final = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", _DIFFUSERS_PREFIX)
_SUFFIXES: Final[tuple[tuple[str, Role], ...]] = (
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_B.bias", "bias"),
    (".down.weight", "down"),
    (".up.weight", "up"),
    (".alpha", "alpha"),
    (".dora_scale", "magnitude"),
    (".lora_magnitude_vector.default.weight", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
)
"""Longer ends stand before those they end with."""

_XLABS: Final = re.compile(
    r"(double|single)_blocks\.(\d+)\.processor\.(qkv_lora1|qkv_lora2|proj_lora1|proj_lora2|qkv_lora|proj_lora)"
)
_XLABS_DOUBLE: Final = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}
_XLABS_SINGLE: Final = {"qkv_lora": ("linear1", QKV_OF_LINEAR1), "proj_lora": ("linear2", 0)}
_XLABS_BY_PART: Final = {part: own for own, part in _XLABS_DOUBLE.items()}
_CLIP_PREFIXES: Final = ("text_encoder.", "text_encoders.clip_l.transformer.")
_T5_PREFIXES: Final = ("text_encoder_2.", "text_encoders.t5xxl.transformer.")
_OLD_CLIP: Final = {
    f".to_{own}_lora": f".{name}_proj" for own, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))
}


@dataclass(frozen=True)
class Place:
    """The adapter called `name`, or its part number `index` where the form cuts fused layers up."""

    form: Form
    name: str
    index: int = 0
    num_parts: int = 1


def split_suffix(key: str) -> tuple[str, Role] | None:
    """The module that a key speaks of and the role of its tensor; None for a key of no known end."""
    for suffix, role in _SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return None


def place_of(module: str) -> Place | None:
    """Where the adapter on `module`, a file's own name for it, belongs."""
    if module.startswith("lora_"):
        return _place_of_joined(module)
    for part, prefixes in (("te3", _T5_PREFIXES), ("te1", _CLIP_PREFIXES)):
        for prefix in prefixes:
            if module.startswith(prefix):
                path = module.removeprefix(prefix)
                for old, new in _OLD_CLIP.items():
                    path = path.removesuffix(old) + new if path.endswith(old) else path
                name = published_name("te1" if part == "te1" else "te3", path)
                return None if layer_of(name) is None else Place("diffusers", name)
    if module.startswith(_DIFFUSERS_PREFIX):
        # Some layers have the same name in both layouts; only this tells them apart.
        place = _place_of_diffusers(module.removeprefix(_DIFFUSERS_PREFIX))
        if place is not None:
            return place
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    found = _XLABS.fullmatch(module)
    if found is not None:
        return _place_of_xlabs(*found.groups())
    if is_flux_path(module):
        return Place("bfl", published_name("unet", module))
    return _place_of_diffusers(module)


def _place_of_joined(module: str) -> Place | None:
    if module.startswith("lora_transformer_"):
        return _place_of_diffusers(module.removeprefix("lora_transformer_"))
    layer = layer_of(module)
    return None if layer is None else Place("sd-scripts", published_name(*layer))


def _place_of_diffusers(module: str) -> Place | None:
    found = published_of_module(module)
    if found is None:
        return None
    path, index = found
    return Place("diffusers", published_name("unet", path), index, len(diffusers_modules(path)))


def _place_of_xlabs(kind: str, block: str, own: str) -> Place | None:
    if kind == "double":
        part = _XLABS_DOUBLE.get(own)
        return None if part is None else Place("xlabs", published_name("unet", f"double_blocks.{block}.{part}"))
    place = _XLABS_SINGLE.get(own)
    return (
        None if place is None else Place("xlabs", published_name("unet", f"single_blocks.{block}.{place[0]}"), place[1])
    )


def norm_of(key: str) -> str | None:
    """The path in FLUX of the query or key norm whose weight `key` holds; None for any other key."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    path = key.removesuffix(".scale")
    if path != key and is_norm_path(path):
        return path
    module = key.removesuffix(".weight")
    return None if module == key else published_of_norm(module)


def form_of(keys: Iterable[str]) -> Form | None:
    """The form of a LoRA file with these keys, told by its FLUX part where it has one; None when it is of none."""
    found: Form | None = None
    for key in keys:
        split = split_suffix(key)
        place = None if split is None else place_of(split[0])
        if place is None:
            continue
        found = found or place.form
        if not key.startswith(("lora_te", "text_encoder")):
            return place.form
    return found


# ---------------------------------------------------------------------------------------------------- a form's own keys


def module_keys(form: Form, module: str) -> dict[Role, str]:
    """The keys of an adapter on `module`, in the order in which they are written."""
    if form == "sd-scripts":
        return {
            "alpha": f"{module}.alpha",
            "down": f"{module}.lora_down.weight",
            "up": f"{module}.lora_up.weight",
            "magnitude": f"{module}.dora_scale",
        }
    if form == "xlabs":
        return {"down": f"{module}.down.weight", "up": f"{module}.up.weight"}
    return {
        "down": f"{module}.lora_A.weight",
        "up": f"{module}.lora_B.weight",
        "bias": f"{module}.lora_B.bias",
        "alpha": f"{module}.alpha",
        # PEFT takes it without ".weight" too, transformers' loader for the text encoders does not.
        "magnitude": f"{module}.lora_magnitude_vector.weight",
    }


def diffusers_names(name: str) -> tuple[str, ...] | None:
    """The modules that the adapter called `name` becomes in a file for diffusers; None when it knows no such layer."""
    layer = layer_of(name)
    if layer is None:
        return None
    part, path = layer
    if part == "unet":
        return tuple(f"transformer.{module}" for module in diffusers_modules(path))
    return (f"text_encoder.{path}" if part == "te1" else f"text_encoder_2.{path}",)


def bfl_name(name: str) -> str | None:
    """The adapter's module in a file of Black Forest Labs' form; None for a text encoder's, which that form has not."""
    layer = layer_of(name)
    return layer[1] if layer is not None and layer[0] == "unet" else None


def xlabs_name(name: str) -> str | None:
    """The adapter's module in XLabs' form, which knows only attention and the single blocks' linears; else None."""
    layer = layer_of(name)
    if layer is None or layer[0] != "unet":
        return None
    kind, _, rest = layer[1].partition("_blocks.")
    block, _, part = rest.partition(".")
    if kind == "double" and part in _XLABS_BY_PART:
        return f"double_blocks.{block}.processor.{_XLABS_BY_PART[part]}"
    own = {"linear1": "qkv_lora", "linear2": "proj_lora"}.get(part) if kind == "single" else None
    return None if own is None else f"single_blocks.{block}.processor.{own}"


def norm_key(form: Form, path: str) -> str:
    """The key of a replaced norm, in the two forms that have such."""
    return f"transformer.{diffusers_norm(path)}.weight" if form == "diffusers" else f"{path}.scale"


def inexpressible(form: Form, names: Iterable[str], *, is_linear1_whole: bool) -> list[str]:
    """The adapters that `form` has no place for. `is_linear1_whole`: whether linear1's MLP part counts as adapted."""
    tests: Mapping[Form, object] = {"diffusers": diffusers_names, "bfl": bfl_name, "xlabs": xlabs_name}
    test = tests.get(form)
    if not callable(test):
        return []
    refused = [name for name in names if test(name) is None]
    if form == "xlabs" and is_linear1_whole:
        refused += [name for name in names if name.endswith("_linear1")]
    return refused
