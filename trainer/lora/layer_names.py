"""Which layer a name stands for: published adapter names, module paths of FLUX, and the names of diffusers' modules.

Source of the names: the state dicts of the published FLUX.1 model, of `FluxTransformer2DModel` in diffusers, of
`CLIPTextModel` and of `T5EncoderModel`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

ModelPart = Literal["unet", "te1", "te3"]
"""FLUX, CLIP-L and T5-XXL, as published names call them."""

CLIP_ROOT: Final = "text_model."

_QKV: Final = ("attn.to_q", "attn.to_k", "attn.to_v")
_TXT_QKV: Final = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_DOUBLE: Final[Mapping[str, tuple[str, ...]]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _TXT_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE: Final[Mapping[str, tuple[str, ...]]] = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OUTER: Final[Mapping[str, str]] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE_NORMS: Final[Mapping[str, str]] = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS: Final[Mapping[str, str]] = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}

HALVES_SWAPPED: Final = "final_layer.adaLN_modulation.1"
"""The layer whose output is (shift, scale) in the published model and (scale, shift) in diffusers."""


def _joined(parts: Mapping[str, object]) -> dict[str, str]:
    return {part.replace(".", "_"): part for part in parts}


_DOUBLE_BY_NAME: Final = _joined(_DOUBLE)
_SINGLE_BY_NAME: Final = _joined(_SINGLE)
_OUTER_BY_NAME: Final = _joined(_OUTER)
_DOUBLE_BY_MODULE: Final = {m: (part, i) for part, modules in _DOUBLE.items() for i, m in enumerate(modules)}
_SINGLE_BY_MODULE: Final = {m: (part, i) for part, modules in _SINGLE.items() for i, m in enumerate(modules)}
_OUTER_BY_MODULE: Final = {module: path for path, module in _OUTER.items()}
_DOUBLE_BY_JOINED: Final = {module.replace(".", "_"): module for module in _DOUBLE_BY_MODULE}
_SINGLE_BY_JOINED: Final = {module.replace(".", "_"): module for module in _SINGLE_BY_MODULE}
_OUTER_BY_JOINED: Final = {module.replace(".", "_"): module for module in _OUTER_BY_MODULE}

_BLOCK_NAME: Final = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_BLOCK_PATH: Final = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_BLOCK_MODULE: Final = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_JOINED_BLOCK_MODULE: Final = re.compile(r"(single_)?transformer_blocks_(\d+)_(.+)")
_CLIP_NAME: Final = re.compile(r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_(\w+)")
_T5_NAME: Final = re.compile(r"encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(\w+)")
_NAME: Final = re.compile(r"lora_(unet|te1|te3|te)_(.+)")


def layer_name(part: ModelPart, path: str) -> str:
    """The published adapter name of the layer at the dotted `path`; CLIP-L's paths may lack their root."""
    if part == "te1":
        path = CLIP_ROOT + path.removeprefix(CLIP_ROOT)
    return f"lora_{part}_{path.replace('.', '_')}"


def layer_of(name: str) -> tuple[ModelPart, str] | None:
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
    found = _BLOCK_NAME.fullmatch(rest)
    if found is None:
        return _OUTER_BY_NAME.get(rest)
    kind, index, part = found.groups()
    path = (_DOUBLE_BY_NAME if kind == "double" else _SINGLE_BY_NAME).get(part)
    return None if path is None else f"{kind}_blocks.{index}.{path}"


def _clip_path(rest: str) -> str | None:
    found = _CLIP_NAME.fullmatch(rest)
    return None if found is None else "{}encoder.layers.{}.{}.{}".format(CLIP_ROOT, *found.groups())


def _t5_path(rest: str) -> str | None:
    found = _T5_NAME.fullmatch(rest)
    return None if found is None else "encoder.block.{}.layer.{}.{}.{}".format(*found.groups())


def is_flux_path(path: str) -> bool:
    """Whether `path` is a Linear of the published FLUX model that an adapter may stand on."""
    return _flux_path(path.replace(".", "_")) == path


def diffusers_modules(path: str) -> tuple[str, ...]:
    """The modules of diffusers that make up the Linear at `path` of FLUX, in the order of its output features."""
    found = _BLOCK_PATH.fullmatch(path)
    if found is None:
        return (_OUTER[path],)
    kind, index, part = found.groups()
    if kind == "double":
        return tuple(f"transformer_blocks.{index}.{module}" for module in _DOUBLE[part])
    return tuple(f"single_transformer_blocks.{index}.{module}" for module in _SINGLE[part])


def published_of_module(module: str) -> tuple[str, int] | None:
    """The Linear of FLUX that a module of diffusers is part of, and which part; None for any other module."""
    found = _BLOCK_MODULE.fullmatch(module)
    if found is None:
        path = _OUTER_BY_MODULE.get(module)
        return None if path is None else (path, 0)
    is_single, index, rest = found.groups()
    place = (_SINGLE_BY_MODULE if is_single else _DOUBLE_BY_MODULE).get(rest)
    return None if place is None else (f"{'single' if is_single else 'double'}_blocks.{index}.{place[0]}", place[1])


def module_of_joined(joined: str) -> str | None:
    """The module of diffusers whose path, with underscores for dots, is `joined`."""
    found = _JOINED_BLOCK_MODULE.fullmatch(joined)
    if found is None:
        return _OUTER_BY_JOINED.get(joined)
    is_single, index, rest = found.groups()
    module = (_SINGLE_BY_JOINED if is_single else _DOUBLE_BY_JOINED).get(rest)
    return None if module is None else f"{is_single or ''}transformer_blocks.{index}.{module}"


def diffusers_norm(path: str) -> str:
    """The norm of diffusers that is the one at `path` of FLUX (without `.scale`)."""
    kind, index, part = _split_block(path)
    if kind == "double":
        return f"transformer_blocks.{index}.{_DOUBLE_NORMS[part]}"
    return f"single_transformer_blocks.{index}.{_SINGLE_NORMS[part]}"


def published_of_norm(module: str) -> str | None:
    """The path in FLUX of a query or key norm of diffusers."""
    found = _BLOCK_MODULE.fullmatch(module)
    if found is None:
        return None
    is_single, index, rest = found.groups()
    for part, name in (_SINGLE_NORMS if is_single else _DOUBLE_NORMS).items():
        if name == rest:
            return f"{'single' if is_single else 'double'}_blocks.{index}.{part}"
    return None


def is_norm_path(path: str) -> bool:
    """Whether `path` is a query or key norm of FLUX."""
    found = _BLOCK_PATH.fullmatch(path)
    return found is not None and found[3] in (_DOUBLE_NORMS if found[1] == "double" else _SINGLE_NORMS)


def _split_block(path: str) -> tuple[str, str, str]:
    found = _BLOCK_PATH.fullmatch(path)
    if found is None:
        raise ValueError(f"{path} is not in a block")
    return found[1], found[2], found[3]
