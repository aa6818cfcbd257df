"""Which layer a name stands for: published adapter names, module paths of the models, and the names of diffusers' modules.

Source of the names: the state dicts of the published FLUX.1 and Chroma1 models, of `FluxTransformer2DModel` and
`ChromaTransformer2DModel` in diffusers, of `CLIPTextModel` and of `T5EncoderModel`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from trainer.lora.naming import CLIP_ROOT, Component, published_name
from trainer.schema.key_names import FLUX_DOUBLE, FLUX_OUTER, FLUX_SINGLE

HALVES_SWAPPED: Final = "final_layer.adaLN_modulation.1"
"""The layer whose output is (shift, scale) in the published model and (scale, shift) in diffusers."""

APPROXIMATOR: Final = "distilled_guidance_layer"
"""The module that only Chroma has, in both layouts."""

_OUTER: Final[Mapping[str, str]] = {
    **FLUX_OUTER,
    HALVES_SWAPPED: "norm_out.linear",
    **{f"{APPROXIMATOR}.{own}": f"{APPROXIMATOR}.{own}" for own in ("in_proj", "out_proj")},
}
"""Linears that are not in a numbered block, and their modules in diffusers."""


@dataclass(frozen=True)
class _Blocks:
    """Numbered blocks: where they are in the model and in diffusers, and what each holds there.

    `linears` are the modules in diffusers that make up each Linear, in the order of its output features.
    """

    path: str
    module: str
    linears: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]


def _blocks(path: str, module: str, layers: Mapping[str, tuple[str, ...]]) -> _Blocks:
    norms = {part: modules[0] for part, modules in layers.items() if part.endswith("_norm")}
    return _Blocks(path, module, {part: modules for part, modules in layers.items() if part not in norms}, norms)


_KINDS: Final = (
    _blocks("double_blocks", "transformer_blocks", FLUX_DOUBLE),
    _blocks("single_blocks", "single_transformer_blocks", FLUX_SINGLE),
    _blocks(
        f"{APPROXIMATOR}.layers",
        f"{APPROXIMATOR}.layers",
        {"in_layer": ("linear_1",), "out_layer": ("linear_2",)},
    ),
)


def _joined(dotted: str) -> str:
    return dotted.replace(".", "_")


_CLIP_NAME: Final = re.compile(r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_(\w+)")
_T5_NAME: Final = re.compile(r"encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(\w+)")
_NAME: Final = re.compile(r"lora_(unet|te1|te3|te)_(.+)")
_NUMBERED: Final = re.compile(r"(\d+)[._](.+)")


def layer_of(name: str) -> tuple[Component, str] | None:
    """The model and the dotted path that a published adapter name stands for; None when there is no such layer."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    part, rest = found.groups()
    path = {"unet": _flux_path, "te1": _clip_path, "te": _clip_path, "te3": _t5_path}[part](rest)
    if path is None:
        return None
    return ("unet" if part == "unet" else "te3" if part == "te3" else "te1"), path


def _flux_path(rest: str) -> str | None:
    for path in _OUTER:
        if _joined(path) == rest:
            return path
    for blocks in _KINDS:
        found = _inside(rest, f"{_joined(blocks.path)}_")
        for part in blocks.linears if found is not None else ():
            if found is not None and _joined(part) == found[1]:
                return f"{blocks.path}.{found[0]}.{part}"
    return None


def _inside(name: str, prefix: str) -> tuple[str, str] | None:
    """Number and rest of what follows `prefix`."""
    found = _NUMBERED.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
    return None if found is None else (found[1], found[2])


def _clip_path(rest: str) -> str | None:
    found = _CLIP_NAME.fullmatch(rest)
    return None if found is None else "{}encoder.layers.{}.{}.{}".format(CLIP_ROOT, *found.groups())


def _t5_path(rest: str) -> str | None:
    found = _T5_NAME.fullmatch(rest)
    return None if found is None else "encoder.block.{}.layer.{}.{}.{}".format(*found.groups())


def is_flux_path(path: str) -> bool:
    """Whether `path` is a Linear of the published FLUX or Chroma model that an adapter may stand on."""
    return _flux_path(_joined(path)) == path


def is_flux_name(name: str) -> bool:
    """Whether a published name is that of the transformer's adapter, not of a text encoder's."""
    layer = layer_of(name)
    return layer is not None and layer[0] == "unet"


def is_chroma_only(name: str) -> bool:
    """Whether a published name is that of an adapter on what Chroma has and FLUX.1 has not."""
    return name.startswith(published_name("unet", f"{APPROXIMATOR}."))


def diffusers_modules(path: str) -> tuple[str, ...]:
    """The modules of diffusers that make up the Linear at `path` of FLUX, in the order of its output features."""
    for blocks in _KINDS:
        found = _inside(path, f"{blocks.path}.")
        if found is not None:
            return tuple(f"{blocks.module}.{found[0]}.{module}" for module in blocks.linears[found[1]])
    return (_OUTER[path],)


def published_of_module(module: str) -> tuple[str, int] | None:
    """The Linear of FLUX that a module of diffusers is part of, and which part; None for any other module.

    The module's path may have underscores for dots, as in keys that begin with `lora_transformer_`.
    """
    for path, own in _OUTER.items():
        if module in (own, _joined(own)):
            return path, 0
    for blocks in _KINDS:
        found = _inside(module, f"{blocks.module}.") or _inside(module, f"{_joined(blocks.module)}_")
        if found is not None:
            for part, modules in blocks.linears.items():
                for index, own in enumerate(modules):
                    if found[1] in (own, _joined(own)):
                        return f"{blocks.path}.{found[0]}.{part}", index
    return None


def diffusers_norm(path: str) -> str:
    """The norm of diffusers that is the one at `path` of FLUX (without `.scale`)."""
    for blocks in _KINDS:
        found = _inside(path, f"{blocks.path}.")
        if found is not None:
            return f"{blocks.module}.{found[0]}.{blocks.norms[found[1]]}"
    raise ValueError(f"{path} is not in a block")


def published_of_norm(module: str) -> str | None:
    """The path in FLUX of a query or key norm of diffusers."""
    for blocks in _KINDS:
        found = _inside(module, f"{blocks.module}.")
        for part, own in blocks.norms.items() if found is not None else ():
            if found is not None and own == found[1]:
                return f"{blocks.path}.{found[0]}.{part}"
    return None


def is_norm_path(path: str) -> bool:
    """Whether `path` is a query or key norm of FLUX."""
    found = [_inside(path, f"{blocks.path}.") for blocks in _KINDS]
    return any(inside is not None and inside[1] in blocks.norms for inside, blocks in zip(found, _KINDS, strict=True))
