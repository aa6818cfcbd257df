"""What a model file's header says about the model: that it is of the kind asked for, and its sizes.

Reading a header is `safetensors_header`'s, naming what it describes `model_kinds`'.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from trainer.schema.base import UserError
from trainer.schema.key_names import flux_in_diffusers
from trainer.schema.model_kinds import CONTROL_MODELS, is_diffusers_autoencoder, is_diffusers_flux, noun, strip_prefix
from trainer.schema.model_kinds import ModelKind as ModelKind
from trainer.schema.model_kinds import describe as describe
from trainer.schema.model_kinds import format_bytes as format_bytes
from trainer.schema.model_kinds import identify as identify
from trainer.schema.safetensors_header import Header as Header
from trainer.schema.safetensors_header import TensorInfo as TensorInfo
from trainer.schema.safetensors_header import read_header as read_header
from trainer.schema.safetensors_header import read_sizes
from trainer.schema.stored_scales import fp8_parts, stored_scales

_SD3_SCALE_FACTOR: Final = 1.5305


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a FLUX.1 transformer. `axes_dim` are the head dimensions rotated by axis 0, row and column."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: int
    qkv_bias: bool
    guidance_embed: bool
    fp8_linears: bool = False
    """Whether the file has the Linears of its blocks in fp8."""
    fp8_modulation: bool = False
    """Whether it has their modulation layers so, too."""

    @property
    def is_schnell(self) -> bool:
        """True for the variant without a guidance embedding."""
        return not self.guidance_embed


@dataclass(frozen=True)
class AutoencoderParams:
    """Sizes of a FLUX.1 autoencoder; latents are `scale_factor * (z - shift_factor)`."""

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


@dataclass(frozen=True)
class ClipParams:
    """Sizes of a CLIP text encoder."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2


@dataclass(frozen=True)
class T5Params:
    """Sizes of a T5 v1.1 encoder."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    vocab_size: int
    num_buckets: int
    max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


# --------------------------------------------------------------------------------------------------------- checking

EXPECTED_NOUNS: Final[Mapping[str, str]] = {
    "flux": "a FLUX.1 model such as flux1-dev.safetensors",
    "chroma": "a Chroma model such as Chroma1-HD.safetensors",
    "autoencoder": "the FLUX.1 autoencoder, ae.safetensors",
    "clip_l": "the CLIP-L text encoder, clip_l.safetensors",
    "t5xxl": "the T5-XXL text encoder, t5xxl_fp16.safetensors",
    "lora": "a LoRA file",
}
CHROMA_HINTS: Final[Mapping[tuple[str, str], str]] = {
    ("flux", "chroma"): "Add --model_type=chroma.",
    ("chroma", "flux"): "Leave --model_type=chroma out.",
}
"""(kind needed, kind found) -> what to do when only --model_type is wrong."""


def require_kind(header: Header, kind: ModelKind) -> None:
    """Raise unless the file is of `kind` and stored in a way that can be read."""
    found = identify(header)
    where = str(header.path)
    if found != kind:
        hint = CHROMA_HINTS.get((kind, found), f"What is needed here is {EXPECTED_NOUNS[kind]}.")
        raise UserError(f"this is {noun(header)}", where, hint)
    stored_scales(header)


# ------------------------------------------------------------------------------------------------------- dimensions


def flux_params(header: Header) -> FluxParams:
    """The sizes of a FLUX.1 file in any layout. Raises `UserError` for other files and for sizes that cannot be told."""
    require_kind(header, "flux")
    stripped = strip_prefix(header.tensors)
    shapes = Shapes(header, stripped)
    in_diffusers = is_diffusers_flux(stripped)

    def name(published: str) -> str:
        if in_diffusers:
            return flux_in_diffusers(published)[0].name
        # Newer ComfyUI versions write the norms' `scale` as `weight`.
        newer = f"{published.removesuffix('.scale')}.weight"
        return newer if published.endswith(".scale") and not shapes.has(published) else published

    hidden_size, in_channels = shapes.matrix(name("img_in.weight"))
    context_in_dim = shapes.matrix(name("txt_in.weight"))[1]
    vec_in_dim = shapes.matrix(name("vector_in.in_layer.weight"))[1]
    out_channels = shapes.matrix(name("final_layer.linear.weight"))[0]
    head_dim = shapes.of(name("double_blocks.0.img_attn.norm.query_norm.scale"), 1)[0]
    mlp_hidden = shapes.matrix(name("double_blocks.0.img_mlp.0.weight"))[0]
    if in_channels != out_channels:
        raise _control_model(header, in_channels, out_channels)
    config = Config(header)
    fp8_linears, fp8_modulation = fp8_parts(header)
    params = FluxParams(
        in_channels=in_channels,
        out_channels=out_channels,
        vec_in_dim=vec_in_dim,
        context_in_dim=context_in_dim,
        hidden_size=hidden_size,
        mlp_ratio=mlp_hidden / hidden_size,
        num_heads=max(hidden_size // head_dim, 1),
        depth=shapes.count(r"(?:double_blocks|transformer_blocks)\.(\d+)\."),
        depth_single_blocks=shapes.count(r"(?:single_blocks|single_transformer_blocks)\.(\d+)\."),
        axes_dim=config.integers("axes_dim", default_axes(head_dim)),
        theta=config.integer("theta", 10_000),
        qkv_bias=shapes.has(name("double_blocks.0.img_attn.qkv.bias")),
        guidance_embed=shapes.has(name("guidance_in.in_layer.weight")),
        fp8_linears=fp8_linears,
        fp8_modulation=fp8_modulation,
    )
    check_axes(header, hidden_size, head_dim, params.axes_dim)
    return params


def check_axes(header: Header, hidden_size: int, head_dim: int, axes_dim: tuple[int, ...]) -> None:
    """Raise `UserError` unless heads of `head_dim` fill the width and the rotation axes fill a head."""
    if max(hidden_size // head_dim, 1) * head_dim != hidden_size:
        raise UserError(
            f"the width {hidden_size} is not a multiple of the head size {head_dim}",
            str(header.path),
            "The file is damaged or of another model; use a FLUX.1 dev or schnell file.",
        )
    if sum(axes_dim) != head_dim:
        raise UserError(
            f"the rotation axes {axes_dim} do not add up to the head size {head_dim}",
            str(header.path),
            'Give the right "axes_dim" in the metadata entry "config" of the file.',
        )
    if any(axis % 2 for axis in axes_dim):
        raise UserError(
            f"the rotation axes {axes_dim} must all be even",
            str(header.path),
            'Give the right "axes_dim" in the metadata entry "config" of the file.',
        )


def _control_model(header: Header, in_channels: int, out_channels: int) -> UserError:
    """Why a model with a wider input can't be trained here."""
    name, condition = CONTROL_MODELS.get(in_channels, ("a FLUX.1 control model", "a condition"))
    return UserError(
        f"this is {name}: it takes {in_channels} input channels instead of {out_channels}, because it is trained with "
        f"{condition} beside each picture; such models are not supported",
        str(header.path),
        "Use a FLUX.1 dev or schnell file; a LoRA trained on dev mostly works on it, too.",
    )


def default_axes(head_dim: int) -> tuple[int, ...]:
    """One eighth of the head for axis 0, the rest halved; (16, 56, 56) for 128. Rounded up so that all three are even."""
    first = head_dim // 8
    while first < head_dim and (first % 2 or (head_dim - first) % 4):
        first += 1
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def autoencoder_params(header: Header) -> AutoencoderParams:
    """The sizes of a FLUX.1 autoencoder file in any layout. Raises `UserError` for other files."""
    require_kind(header, "autoencoder")
    shapes = Shapes(header, header.tensors)
    in_diffusers = is_diffusers_autoencoder(header.tensors)
    down, first = ("down_blocks", "resnets.0") if in_diffusers else ("down", "block.0")
    ch, in_channels = shapes.of("encoder.conv_in.weight", 4)[:2]
    num_levels = shapes.count(rf"encoder\.{down}\.(\d+)\.")
    widths = [shapes.of(f"encoder.{down}.{level}.{first}.conv1.weight", 4)[0] for level in range(num_levels)]
    config = Config(header)
    scale_factor = config.number("scale_factor", 0.3611)
    if abs(scale_factor - _SD3_SCALE_FACTOR) < 1e-4:
        raise UserError(
            "this is the autoencoder of Stable Diffusion 3: its shapes are FLUX.1's, its latents are not",
            str(header.path),
            f"What is needed here is {EXPECTED_NOUNS['autoencoder']}.",
        )
    return AutoencoderParams(
        resolution=config.integer("resolution", 256),
        in_channels=in_channels,
        ch=ch,
        out_ch=shapes.of("decoder.conv_out.weight", 4)[0],
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=shapes.count(rf"encoder\.{down}\.0\.{first.removesuffix('.0')}\.(\d+)\."),
        z_channels=shapes.of("decoder.conv_in.weight", 4)[1],
        scale_factor=scale_factor,
        shift_factor=config.number("shift_factor", 0.1159),
    )


def clip_params(header: Header) -> ClipParams:
    """The sizes of a CLIP text encoder file; its heads have 64 dimensions unless the file's metadata says otherwise."""
    require_kind(header, "clip_l")
    prefix = "text_model." if "text_model.embeddings.token_embedding.weight" in header.tensors else ""
    shapes = Shapes(header, header.tensors)
    vocab_size, hidden_size = shapes.matrix(f"{prefix}embeddings.token_embedding.weight")
    config = Config(header)
    num_heads = config.integer("num_attention_heads", max(hidden_size // 64, 1))
    if hidden_size % num_heads or ("num_attention_heads" not in config and hidden_size % 64):
        raise UserError(
            f"the number of attention heads of this CLIP text encoder (width {hidden_size}) cannot be told",
            str(header.path),
            'Give "num_attention_heads" in the metadata entry "config" of the file.',
        )
    return ClipParams(
        hidden_size=hidden_size,
        intermediate_size=shapes.matrix(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        num_attention_heads=num_heads,
        num_hidden_layers=shapes.count(re.escape(prefix) + r"encoder\.layers\.(\d+)\."),
        vocab_size=vocab_size,
        max_position_embeddings=shapes.matrix(f"{prefix}embeddings.position_embedding.weight")[0],
        layer_norm_eps=config.number("layer_norm_eps", 1e-5),
        eos_token_id=config.integer("eos_token_id", 2),
    )


def t5_params(header: Header) -> T5Params:
    """The sizes of a T5 v1.1 encoder file. Raises `UserError` for other files."""
    require_kind(header, "t5xxl")
    shapes = Shapes(header, header.tensors)
    embedding = "shared.weight" if shapes.has("shared.weight") else "encoder.embed_tokens.weight"
    vocab_size, d_model = shapes.matrix(embedding)
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = shapes.matrix(f"{attention}.relative_attention_bias.weight")
    inner_dim = shapes.matrix(f"{attention}.q.weight")[0]
    if inner_dim % num_heads:
        raise UserError(
            f"the attention width {inner_dim} is not a multiple of its {num_heads} heads",
            str(header.path),
            "The file is damaged or of another model; use t5xxl_fp16.safetensors.",
        )
    config = Config(header)
    return T5Params(
        d_model=d_model,
        d_ff=shapes.matrix("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        d_kv=inner_dim // num_heads,
        num_heads=num_heads,
        num_layers=shapes.count(r"encoder\.block\.(\d+)\."),
        vocab_size=vocab_size,
        num_buckets=num_buckets,
        max_distance=config.integer("relative_attention_max_distance", 128),
        layer_norm_epsilon=config.number("layer_norm_epsilon", 1e-6),
    )


class Shapes:
    """Shapes by tensor name; a missing or odd one is a `UserError` that names it."""

    def __init__(self, header: Header, tensors: Mapping[str, TensorInfo]) -> None:
        self._where = str(header.path)
        self._tensors = tensors

    def has(self, name: str) -> bool:
        return name in self._tensors

    def of(self, name: str, num_axes: int) -> tuple[int, ...]:
        info = self._tensors.get(name)
        if info is None:
            raise UserError(
                f"the tensor {name!r} is missing", self._where, "The file is not complete; use another one."
            )
        if len(info.shape) != num_axes or 0 in info.shape:
            raise UserError(
                f"the tensor {name!r} has the shape {list(info.shape)}; {num_axes} axes were expected",
                self._where,
                "The file is quantised or of another model; use the bf16, fp16 or plain fp8 file.",
            )
        return info.shape

    def matrix(self, name: str) -> tuple[int, int]:
        rows, columns = self.of(name, 2)
        return rows, columns

    def count(self, pattern: str) -> int:
        """One more than the highest index that `pattern` captures at the start of a name."""
        matches = (re.match(pattern, name) for name in self._tensors)
        return max((int(match[1]) + 1 for match in matches if match is not None), default=0)


class Config:
    """What a file states about itself beyond its shapes: JSON under the metadata key `config`."""

    def __init__(self, header: Header) -> None:
        self._where = f"{header.path}, metadata entry config"
        try:
            parsed: object = json.loads(header.metadata.get("config", "{}"))
        except (ValueError, RecursionError):
            parsed = {}  # another program's entry of the same name
        self._values = cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def integer(self, name: str, default: int) -> int:
        value = self._values.get(name, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self._wrong(name, value, "a whole number, 1 or more")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(name, value, "a number")
        return float(value)

    def integers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        value = self._values.get(name, list(default))
        sizes = read_sizes(value)
        if not sizes or 0 in sizes:
            raise self._wrong(name, value, "a list of whole numbers, 1 or more")
        return sizes

    def _wrong(self, name: str, value: object, expected: str) -> UserError:
        return UserError(f"{name} is {value!r}; it must be {expected}", self._where)
