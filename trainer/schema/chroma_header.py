"""The sizes of a Chroma transformer, read from the header of its file, and every parameter that such a file must hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    Config,
    FluxParams,
    Header,
    Shapes,
    check_axes,
    default_axes,
    flux_params,
    require_kind,
)
from trainer.schema.key_names import Part, Parts, flux_in_diffusers
from trainer.schema.model_kinds import is_diffusers_flux, strip_prefix
from trainer.schema.model_shapes import Shape, flux_shapes
from trainer.schema.stored_scales import fp8_parts
from trainer.schema.weight_files import read_weights

DOUBLE_VECTORS: Final = 12
"""Modulation vectors of a double block: shift, scale and gate, of attention and MLP, of image and text."""
SINGLE_VECTORS: Final = 3
LAST_VECTORS: Final = 2

VISIBLE_PADDING: Final = 1
"""Padding tokens that the transformer sees after each caption; it was trained so."""

_APPROXIMATOR: Final = "distilled_guidance_layer"
_FLUX_MODULATION: Final = (
    "time_in.",
    "vector_in.",
    "guidance_in.",
    "final_layer.adaLN_modulation.",
)


@dataclass(frozen=True)
class ChromaParams:
    """Sizes of a Chroma transformer: those of FLUX.1's blocks, and the approximator's."""

    in_channels: int
    out_channels: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: int
    qkv_bias: bool
    approximator_in_dim: int
    approximator_hidden_size: int
    approximator_depth: int
    fp8_linears: bool = False
    """Whether the file has the Linears of its blocks in fp8."""

    @property
    def fp8_modulation(self) -> bool:
        """False: its blocks have no modulation layers."""
        return False

    @property
    def is_schnell(self) -> bool:
        """False: the length of the text and the schedule of samples are those of dev, though schnell's blocks were taken."""
        return False

    @property
    def num_modulation_vectors(self) -> int:
        """How many vectors the approximator gives; 344 for Chroma1."""
        return SINGLE_VECTORS * self.depth_single_blocks + DOUBLE_VECTORS * self.depth + LAST_VECTORS


TransformerParams = FluxParams | ChromaParams


def read_transformer(path: Path, model_type: Literal["flux", "chroma"]) -> TransformerParams:
    """The sizes of the transformer that `path` names. Raises `UserError` when it is not of `model_type`."""
    header = read_weights(path, model_type)
    return chroma_params(header) if model_type == "chroma" else flux_params(header)


def chroma_params(header: Header) -> ChromaParams:
    """The sizes of a Chroma file in any layout. Raises `UserError` for other files and for sizes that cannot be told."""
    require_kind(header, "chroma")
    stripped = strip_prefix(header.tensors)
    shapes = Shapes(header, stripped)
    if any(name.startswith("nerf_") for name in stripped):
        raise UserError(
            "this is Chroma1-Radiance, which works on pixels instead of latents; it is not supported",
            str(header.path),
            "Use a Chroma1 file such as Chroma1-HD.safetensors.",
        )
    in_diffusers = is_diffusers_flux(stripped)

    def name(published: str) -> str:
        if in_diffusers:
            return chroma_in_diffusers(published)[0].name
        newer = f"{published.removesuffix('.scale')}.weight"
        return newer if published.endswith(".scale") and not shapes.has(published) else published

    hidden_size, in_channels = shapes.matrix(name("img_in.weight"))
    head_dim = shapes.of(name("double_blocks.0.img_attn.norm.query_norm.scale"), 1)[0]
    approximator_hidden_size, approximator_in_dim = shapes.matrix(name(f"{_APPROXIMATOR}.in_proj.weight"))
    config = Config(header)
    params = ChromaParams(
        in_channels=in_channels,
        out_channels=shapes.matrix(name("final_layer.linear.weight"))[0],
        context_in_dim=shapes.matrix(name("txt_in.weight"))[1],
        hidden_size=hidden_size,
        mlp_ratio=shapes.matrix(name("double_blocks.0.img_mlp.0.weight"))[0] / hidden_size,
        num_heads=max(hidden_size // head_dim, 1),
        depth=shapes.count(r"(?:double_blocks|transformer_blocks)\.(\d+)\."),
        depth_single_blocks=shapes.count(r"(?:single_blocks|single_transformer_blocks)\.(\d+)\."),
        axes_dim=config.integers("axes_dim", default_axes(head_dim)),
        theta=config.integer("theta", 10_000),
        qkv_bias=shapes.has(name("double_blocks.0.img_attn.qkv.bias")),
        approximator_in_dim=approximator_in_dim,
        approximator_hidden_size=approximator_hidden_size,
        approximator_depth=shapes.count(rf"{_APPROXIMATOR}\.layers\.(\d+)\."),
        fp8_linears=fp8_parts(header)[0],
    )
    if approximator_in_dim % 8:
        raise UserError(
            f"the approximator's input is {approximator_in_dim} wide; it must be a multiple of 8",
            str(header.path),
            "The file is damaged or of another model; use a Chroma1 file.",
        )
    check_axes(header, hidden_size, head_dim, params.axes_dim)
    return params


def chroma_shapes(params: ChromaParams) -> dict[str, Shape]:
    """Every parameter of a Chroma transformer, by its published name."""
    like_flux = FluxParams(
        in_channels=params.in_channels,
        out_channels=params.out_channels,
        vec_in_dim=1,
        context_in_dim=params.context_in_dim,
        hidden_size=params.hidden_size,
        mlp_ratio=params.mlp_ratio,
        num_heads=params.num_heads,
        depth=params.depth,
        depth_single_blocks=params.depth_single_blocks,
        axes_dim=params.axes_dim,
        theta=params.theta,
        qkv_bias=params.qkv_bias,
        guidance_embed=False,
    )
    shapes = {
        name: shape
        for name, shape in flux_shapes(like_flux).items()
        if not name.startswith(_FLUX_MODULATION) and "_mod.lin." not in name and ".modulation.lin." not in name
    }
    dim = params.approximator_hidden_size
    linears = {"in_proj": (dim, params.approximator_in_dim), "out_proj": (params.hidden_size, dim)}
    for index in range(params.approximator_depth):
        linears |= {f"layers.{index}.in_layer": (dim, dim), f"layers.{index}.out_layer": (dim, dim)}
        shapes[f"{_APPROXIMATOR}.norms.{index}.scale"] = (dim,)
    for name, shape in linears.items():
        shapes[f"{_APPROXIMATOR}.{name}.weight"] = shape
        shapes[f"{_APPROXIMATOR}.{name}.bias"] = shape[:1]
    return shapes


def chroma_in_diffusers(name: str) -> Parts:
    """The parts in diffusers' layout (ChromaTransformer2DModel) of the Chroma parameter `name`."""
    if not name.startswith(f"{_APPROXIMATOR}."):
        return flux_in_diffusers(name)
    renamed = name.replace(".in_layer.", ".linear_1.").replace(".out_layer.", ".linear_2.")
    return (Part(f"{renamed.removesuffix('.scale')}.weight" if renamed.endswith(".scale") else renamed),)
