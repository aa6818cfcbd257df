"""The names that one parameter has in the layouts of other programs, as published names -> the names in a file.

A fused projection of the published layout is several tensors in diffusers', one below the other; the last modulation
of FLUX.1 holds its two halves in the other order there. Names as in diffusers' FluxTransformer2DModel and AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Part:
    """A tensor of a file that is a part of a parameter. `half` takes its upper (0) or lower (1) rows only."""

    name: str
    half: int | None = None


Parts = tuple[Part, ...]
"""What a parameter is made of, one below the other."""

NameParts = Callable[[str], Parts]

FLUX_OUTER: Final[Mapping[str, str]] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
FLUX_DOUBLE: Final[Mapping[str, tuple[str, ...]]] = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
FLUX_SINGLE: Final[Mapping[str, tuple[str, ...]]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
"""Layers outside of the blocks, of a double and of a single block -> their modules in diffusers."""
_FLUX_BLOCKS: Final[Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]] = {
    "double_blocks": ("transformer_blocks", FLUX_DOUBLE),
    "single_blocks": ("single_transformer_blocks", FLUX_SINGLE),
}


def same_name(name: str) -> Parts:
    """The layout of the published files."""
    return (Part(name),)


def flux_in_diffusers(name: str) -> Parts:
    """The parts in diffusers' layout of the FLUX.1 parameter `name`."""
    path, _, leaf = name.rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf
    if path == "final_layer.adaLN_modulation.1":
        # Published: shift, then scale; diffusers: scale, then shift.
        tensor = f"norm_out.linear.{leaf}"
        return Part(tensor, 1), Part(tensor, 0)
    if path in FLUX_OUTER:
        return (Part(f"{FLUX_OUTER[path]}.{leaf}"),)
    blocks, index, layer = path.split(".", 2)
    block, layers = _FLUX_BLOCKS[blocks]
    return tuple(Part(f"{block}.{index}.{part}.{leaf}") for part in layers[layer])


def autoencoder_in_diffusers(num_levels: int, attention: Mapping[str, str]) -> NameParts:
    """The layout of diffusers' AutoencoderKL; `attention` is one of the two tables below."""

    def parts(name: str) -> Parts:
        side, place, *rest = name.split(".")
        if place in ("conv_in", "conv_out"):
            return (Part(name),)
        if place == "norm_out":
            return (Part(".".join((side, "conv_norm_out", *rest))),)
        if place == "mid":
            return (Part(f"{side}.mid_block.{_middle(rest, attention)}"),)
        level, layer, *inner = rest
        # `up` counts from the highest resolution, `up_blocks` in the order they run.
        block = f"down_blocks.{level}" if place == "down" else f"up_blocks.{num_levels - 1 - int(level)}"
        # downsample -> downsamplers, upsample -> upsamplers
        inner = ["resnets", *_resnet(inner)] if layer == "block" else [f"{layer}rs", "0", *inner]
        return (Part(".".join((side, block, *inner))),)

    return parts


DIFFUSERS_ATTENTION: Final[Mapping[str, str]] = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
OLD_DIFFUSERS_ATTENTION: Final[Mapping[str, str]] = {
    "norm": "group_norm",
    "q": "query",
    "k": "key",
    "v": "value",
    "proj_out": "proj_attn",
}
"""Names before diffusers 0.17."""


def _middle(rest: list[str], attention: Mapping[str, str]) -> str:
    layer, *inner = rest
    if layer == "attn_1":
        return ".".join(("attentions.0", attention[inner[0]], *inner[1:]))
    index = {"block_1": "0", "block_2": "1"}[layer]
    return ".".join(("resnets", *_resnet([index, *inner])))


def _resnet(inner: list[str]) -> list[str]:
    return ["conv_shortcut" if part == "nin_shortcut" else part for part in inner]
