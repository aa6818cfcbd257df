"""What is inside a model file, read from its safetensors header alone.

A safetensors file starts with the header's length (8 bytes, little endian) and the header, a JSON object that gives each
tensor's type, shape and place. Reading it takes milliseconds for a file of any size and needs neither torch nor
safetensors, so the interface and the checks before a run can say what a file is, and that it is whole.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from trainer.schema.base import Problem, UserError

ModelKind = Literal[
    "flux",
    "flux_diffusers",
    "chroma",
    "autoencoder",
    "autoencoder_diffusers",
    "clip_l",
    "t5xxl",
    "text_encoder",
    "lora",
    "unknown",
]

COMFYUI_PREFIX: Final = "model.diffusion_model."
# Parts of an all-in-one file that stand beside the transformer under COMFYUI_PREFIX.
ALL_IN_ONE_PARTS: Final = ("text_encoders.", "vae.", "first_stage_model.", "cond_stage_model.", "conditioner.")
MAX_HEADER_BYTES: Final = 100_000_000

_DTYPE_BITS: Final[Mapping[str, int]] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
_DTYPE_NAMES: Final[Mapping[str, str]] = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8 e4m3",
    "F8_E5M2": "fp8 e5m2",
}
# Types a weight may be stored in; each is cast to the weight dtype when it is loaded.
_LOADABLE_DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3"})
_QUANTISED_SUFFIXES: Final[Mapping[str, str]] = {
    "scaled_fp8": "scaled fp8",
    ".scale_weight": "scaled fp8",
    ".scale_input": "scaled fp8",
    ".weight_scale": "scaled fp8",
    ".input_scale": "scaled fp8",
    ".weight_scale_2": "nvfp4",
    ".comfy_quant": "a quantised layout",
    ".absmax": "bitsandbytes 4-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".wscales": "SVDQuant 4-bit",
}
_LORA_MARKS: Final = (
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    ".lora.down.",
    ".lora.up.",
    ".lora_linear_layer.",
    "_lora.down.",
    "_lora1.down.",
    "_lora2.down.",
    ".lokr_w",
    ".hada_w",
    ".oft_blocks",
    ".oft_diag",
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are byte offsets counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_bytes: int


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


# ---------------------------------------------------------------------------------------------------------- reading


def read_header(path: Path) -> Header:
    """Read and check the header of `path`.

    Raises `UserError` (exit code 3) when the file is missing, is not safetensors, or does not hold all of its data.
    """
    where = str(path)
    try:
        if path.is_dir():
            raise UserError("this is a folder, not a model file", where, "Give the path of one .safetensors file.")
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            start = file.read(64)
            header_bytes = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if not 2 <= header_bytes <= MAX_HEADER_BYTES or start[8:9] != b"{":
                what, hint = _foreign_format(start)
                raise UserError(what, where, hint)
            if 8 + header_bytes > file_bytes:
                raise _truncated(where, file_bytes, None)
            file.seek(8)
            text = file.read(header_bytes)
    except FileNotFoundError:
        raise UserError("this file does not exist", where, "Check the path for a typing error.") from None
    except OSError as error:
        raise UserError(
            f"this file cannot be read ({error.strerror or error})", where, "Check the path and its permissions."
        ) from None
    tensors, metadata = _parse_header(text, where)
    _check_layout(tensors, 8 + header_bytes, file_bytes, where)
    return Header(path=path, tensors=tensors, metadata=metadata, file_bytes=file_bytes)


def _foreign_format(start: bytes) -> tuple[str, str]:
    """What a file is that begins with `start` and is not safetensors, and what to do about it."""
    if start == b"":
        return "this file is empty", "Download it again."
    if start.startswith(b"version https://git-lfs"):
        return (
            "this is a Git LFS pointer, not the model itself",
            "Run `git lfs pull` in its folder, or download the file from the model's page.",
        )
    if start.startswith(b"GGUF"):
        return "this is a GGUF file; GGUF is not supported", "Use the .safetensors file of the model."
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "this is a PyTorch pickle file; pickle files are not loaded", "Use the .safetensors file of the model."
    if start.lstrip()[:1] == b"<":
        return (
            "this is a web page, not a model",
            "The download went to a log-in or licence page; download it again after signing in.",
        )
    return (
        "this is not a safetensors file",
        "Give a file in the .safetensors format; if it should be one, download it again.",
    )


def _truncated(where: str, file_bytes: int, needed_bytes: int | None) -> UserError:
    whole = f"{file_bytes} of {needed_bytes} bytes" if needed_bytes else f"only {file_bytes} bytes, part of its header"
    return UserError(f"this file is not complete: it holds {whole}", where, "Download it again.")


def _parse_header(text: bytes, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    damaged = UserError("the header of this safetensors file is damaged", where, "Download it again.")
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(parsed, dict):
        raise damaged
    entries = cast("dict[str, object]", parsed)
    stored_metadata = entries.pop("__metadata__", {})
    if not isinstance(stored_metadata, dict):
        raise damaged
    metadata = {
        key: value for key, value in cast("dict[str, object]", stored_metadata).items() if isinstance(value, str)
    }
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        info = _tensor_info(entry)
        if info is None:
            raise UserError(f"the header entry of the tensor {name!r} is damaged", where, "Download the file again.")
        tensors[name] = info
    return tensors, metadata


def _tensor_info(entry: object) -> TensorInfo | None:
    """The checked form of one header entry, None when its parts are missing or contradict each other."""
    if not isinstance(entry, dict):
        return None
    fields = cast("dict[str, object]", entry)
    dtype = fields.get("dtype")
    shape = _sizes(fields.get("shape"))
    offsets = _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        return None
    start, end = offsets
    bits = _DTYPE_BITS.get(dtype)
    if bits is None or start > end or (end - start) * 8 != math.prod(shape) * bits:
        return None
    return TensorInfo(dtype=dtype, shape=shape, start=start, end=end)


def _sizes(value: object) -> tuple[int, ...] | None:
    """`value` as a tuple when it is a list of non-negative integers."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    sizes = tuple(item for item in items if type(item) is int and item >= 0)
    return sizes if len(sizes) == len(items) else None


def _check_layout(tensors: Mapping[str, TensorInfo], data_start: int, file_bytes: int, where: str) -> None:
    """Tensors must fill the rest of the file, one after the other, with no gap and no overlap."""
    position = 0
    for info in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if info.start != position:
            raise UserError("the header of this safetensors file is damaged", where, "Download it again.")
        position = info.end
    if data_start + position > file_bytes:
        raise _truncated(where, file_bytes, data_start + position)
    if data_start + position < file_bytes:
        extra = file_bytes - data_start - position
        raise UserError(f"this file holds {extra} bytes more than its header lists", where, "Download it again.")


# ------------------------------------------------------------------------------------------------------ identifying


def identify(header: Header) -> ModelKind:
    """What the file holds, told from its tensor names and shapes."""
    return _identify(header)[0]


def describe(header: Header) -> str:
    """What the file holds, for a person: "FLUX.1 dev, bf16, 23.8 GB"."""
    name = _identify(header)[1]
    dtype = _main_dtype(header)
    return ", ".join([name, *([dtype] if dtype else []), format_bytes(header.file_bytes)])


def noun(header: Header) -> str:
    """What the file holds without its size, to stand in a sentence: "a CLIP text encoder"."""
    return _identify(header)[2]


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` in decimal units, as download pages give them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def _identify(header: Header) -> tuple[ModelKind, str, str]:
    """Kind, title and noun phrase of a file. The first rule that fits decides, so the narrow ones stand first."""
    tensors = header.tensors
    if any(mark in name for name in tensors for mark in _LORA_MARKS):
        return "lora", "LoRA", "a LoRA"
    stripped = strip_prefix(tensors)
    if "double_blocks.0.img_attn.qkv.weight" in stripped:
        return _identify_flux(stripped)
    if "transformer_blocks.0.attn.add_k_proj.weight" in tensors and "x_embedder.weight" in tensors:
        if any(name.startswith("single_transformer_blocks.") for name in tensors):
            return "flux_diffusers", "FLUX.1 in diffusers layout", "a diffusers-layout FLUX file"
        return "unknown", "another diffusion model", "a diffusion model other than FLUX.1"
    encoder = _identify_text_encoder(tensors)
    if encoder is not None:
        return encoder
    autoencoder = _identify_autoencoder(tensors)
    if autoencoder is not None:
        return autoencoder
    for mark, name in (
        ("double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("input_blocks.0.0.weight", "Stable Diffusion (U-Net)"),
        ("double_blocks.0.img_attn_qkv.weight", "HunyuanVideo"),
        ("head.modulation", "Wan"),
    ):
        if mark in stripped:
            return "unknown", f"{name} model", f"a {name} model"
    return "unknown", "unknown model", "a file of unknown content"


def _identify_flux(stripped: Mapping[str, TensorInfo]) -> tuple[ModelKind, str, str]:
    if any(name.startswith("distilled_guidance_layer.") for name in stripped):
        return "chroma", "Chroma", "a Chroma model"
    if "double_blocks.0.img_mod.lin.weight" not in stripped or "vector_in.in_layer.weight" not in stripped:
        return "unknown", "another FLUX-like model", "a FLUX-like model that is not FLUX.1"
    variant = "dev" if "guidance_in.in_layer.weight" in stripped else "schnell"
    return "flux", f"FLUX.1 {variant}", f"a FLUX.1 {variant} model"


def _identify_text_encoder(tensors: Mapping[str, TensorInfo]) -> tuple[ModelKind, str, str] | None:
    t5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
    if t5 in tensors:
        if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
            return "text_encoder", "UMT5 text encoder", "a UMT5 text encoder"
        if "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in tensors:
            return "text_encoder", "T5 v1.0 text encoder", "a T5 v1.0 text encoder (FLUX.1 uses v1.1)"
        return "t5xxl", "T5 text encoder", "a T5 text encoder"
    for prefix in ("text_model.", ""):
        embedding = tensors.get(f"{prefix}embeddings.token_embedding.weight")
        if embedding is not None and f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in tensors:
            width = embedding.shape[-1] if embedding.shape else 0
            if width > 768:
                return "text_encoder", "CLIP text encoder", f"a CLIP text encoder of width {width} (CLIP-L has 768)"
            return "clip_l", "CLIP text encoder", "a CLIP text encoder"
    if any("resblocks.0.attn.in_proj_weight" in name for name in tensors):
        return "text_encoder", "OpenCLIP text encoder", "a text encoder in OpenCLIP layout"
    if "model.layers.0.self_attn.q_proj.weight" in tensors:
        return "text_encoder", "language model", "a language model"
    return None


def _identify_autoencoder(tensors: Mapping[str, TensorInfo]) -> tuple[ModelKind, str, str] | None:
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
        return "autoencoder_diffusers", "autoencoder in diffusers layout", "a diffusers-layout autoencoder"
    if "encoder.down.0.block.0.conv1.weight" not in tensors or "decoder.conv_in.weight" not in tensors:
        return None
    if "quant_conv.weight" in tensors or len(tensors["decoder.conv_in.weight"].shape) != 4:
        return "unknown", "autoencoder of another model", "the autoencoder of another model (not FLUX.1)"
    return "autoencoder", "FLUX.1 autoencoder", "a FLUX.1 autoencoder"


def strip_prefix(tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The transformer's tensors under their own names; unchanged when the file has no ComfyUI prefix.

    An all-in-one file holds text encoders and autoencoder beside the transformer; they are left out.
    """
    if not any(name.startswith(COMFYUI_PREFIX) for name in tensors):
        return tensors
    return {
        name.removeprefix(COMFYUI_PREFIX): info
        for name, info in tensors.items()
        if not name.startswith(ALL_IN_ONE_PARTS)
    }


def _main_dtype(header: Header) -> str:
    """The type that most bytes of the file are stored in."""
    count: Counter[str] = Counter()
    for info in header.tensors.values():
        count[info.dtype] += info.end - info.start
    if not count:
        return ""
    dtype = count.most_common(1)[0][0]
    return _DTYPE_NAMES.get(dtype, dtype.lower())


# --------------------------------------------------------------------------------------------------------- checking

_EXPECTED_NOUNS: Final[Mapping[str, str]] = {
    "flux": "a FLUX.1 model such as flux1-dev.safetensors",
    "autoencoder": "the FLUX.1 autoencoder, ae.safetensors",
    "clip_l": "the CLIP-L text encoder, clip_l.safetensors",
    "t5xxl": "the T5-XXL text encoder, t5xxl_fp16.safetensors",
    "lora": "a LoRA file",
}
_OWN_OPTION: Final[Mapping[str, str]] = {
    "flux": "--pretrained_model_name_or_path",
    "autoencoder": "--ae",
    "clip_l": "--clip_l",
    "t5xxl": "--t5xxl",
    "lora": "--network_weights",
}
_REFUSALS: Final[Mapping[str, tuple[str, str]]] = {
    "flux_diffusers": (
        "this is a diffusers-layout FLUX file; that layout is not supported yet",
        "Use the single-file model, for example flux1-dev.safetensors.",
    ),
    "chroma": ("this is a Chroma model; Chroma is not supported yet", "Use a FLUX.1 dev or schnell file."),
    "autoencoder_diffusers": (
        "this is a diffusers-layout autoencoder; that layout is not supported yet",
        "Use the single-file autoencoder, ae.safetensors.",
    ),
}


def check_kind(header: Header, expected_kind: ModelKind, field: str) -> Problem | None:
    """The problem with giving this file as the option `field`, which takes files of `expected_kind`; None if there is none.

    Besides the kind it checks what loading would refuse: quantised storage, and sizes that cannot be told.
    """
    kind = identify(header)
    where = str(header.path)
    if kind != expected_kind:
        refusal = _REFUSALS.get(kind)
        if refusal is not None and kind.removesuffix("_diffusers").replace("chroma", "flux") == expected_kind:
            return Problem(refusal[0], where, refusal[1], field)
        own = _OWN_OPTION.get(kind)
        hint = f"--{field} takes {_EXPECTED_NOUNS.get(expected_kind, expected_kind)}."
        if own is not None and own != f"--{field}":
            hint += f" This file belongs to {own}."
        return Problem(f"this is {noun(header)}, given as --{field}", where, hint, field)
    try:
        if kind == "flux":
            flux_params(header)
        elif kind == "autoencoder":
            autoencoder_params(header)
        elif kind == "clip_l":
            clip_params(header)
        elif kind == "t5xxl":
            t5_params(header)
    except UserError as error:
        first = error.problems[0]
        return Problem(first.what, first.where, first.hint, field)
    return None


def _require(header: Header, kind: ModelKind) -> None:
    """Raise unless the file is of `kind` and stored in a way that can be loaded."""
    found = identify(header)
    where = str(header.path)
    if found != kind:
        refusal = _REFUSALS.get(found)
        if refusal is not None:
            raise UserError(refusal[0], where, refusal[1])
        raise UserError(f"this is {noun(header)}", where, f"What is needed here is {_EXPECTED_NOUNS[kind]}.")
    tensors = strip_prefix(header.tensors) if kind == "flux" else header.tensors
    for suffix, layout in _QUANTISED_SUFFIXES.items():
        if any(name.endswith(suffix) for name in tensors):
            raise UserError(
                f"this file is stored as {layout}, which is not supported",
                where,
                "Its scales would be lost and the weights be wrong. Use the bf16, fp16 or plain fp8 file.",
            )
    for name, info in tensors.items():
        if info.dtype not in _LOADABLE_DTYPES and not name.endswith("position_ids"):
            stored = _DTYPE_NAMES.get(info.dtype, info.dtype)
            raise UserError(
                f"the tensor {name!r} is stored as {stored}, which is not supported",
                where,
                "Use the bf16, fp16 or plain fp8 (e4m3fn) file.",
            )


# ------------------------------------------------------------------------------------------------------- dimensions


def flux_params(header: Header) -> FluxParams:
    """The sizes of a FLUX.1 file. Raises `UserError` for other files and for sizes that cannot be told."""
    _require(header, "flux")
    shapes = _Shapes(header, strip_prefix(header.tensors))
    hidden_size, in_channels = shapes.matrix("img_in.weight")
    context_in_dim = shapes.matrix("txt_in.weight")[1]
    vec_in_dim = shapes.matrix("vector_in.in_layer.weight")[1]
    out_channels = shapes.matrix("final_layer.linear.weight")[0]
    head_dim = shapes.of("double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    mlp_hidden = shapes.matrix("double_blocks.0.img_mlp.0.weight")[0]
    if in_channels != out_channels:
        raise UserError(
            f"this FLUX.1 model takes {in_channels} input channels instead of {out_channels}; Fill, Canny, Depth and "
            "other control models are not supported",
            str(header.path),
            "Use a FLUX.1 dev or schnell file.",
        )
    config = _Config(header)
    params = FluxParams(
        in_channels=in_channels,
        out_channels=out_channels,
        vec_in_dim=vec_in_dim,
        context_in_dim=context_in_dim,
        hidden_size=hidden_size,
        mlp_ratio=mlp_hidden / hidden_size,
        num_heads=max(hidden_size // head_dim, 1),
        depth=shapes.count(r"double_blocks\.(\d+)\."),
        depth_single_blocks=shapes.count(r"single_blocks\.(\d+)\."),
        axes_dim=config.integers("axes_dim", _default_axes(head_dim)),
        theta=config.integer("theta", 10_000),
        qkv_bias=shapes.has("double_blocks.0.img_attn.qkv.bias"),
        guidance_embed=shapes.has("guidance_in.in_layer.weight"),
    )
    if params.num_heads * head_dim != hidden_size:
        raise UserError(
            f"the width {hidden_size} is not a multiple of the head size {head_dim}",
            str(header.path),
            "The file is damaged or of another model; use a FLUX.1 dev or schnell file.",
        )
    if sum(params.axes_dim) != head_dim:
        raise UserError(
            f"the rotation axes {params.axes_dim} do not add up to the head size {head_dim}",
            str(header.path),
            'Give the right "axes_dim" in the metadata entry "config" of the file.',
        )
    if any(axis % 2 for axis in params.axes_dim):
        raise UserError(
            f"the rotation axes {params.axes_dim} must all be even",
            str(header.path),
            'Give the right "axes_dim" in the metadata entry "config" of the file.',
        )
    return params


def _default_axes(head_dim: int) -> tuple[int, ...]:
    """One eighth of the head for axis 0, the rest halved; (16, 56, 56) for 128. Rounded up so that all three are even."""
    first = head_dim // 8
    while first < head_dim and (first % 2 or (head_dim - first) % 4):
        first += 1
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def autoencoder_params(header: Header) -> AutoencoderParams:
    """The sizes of a FLUX.1 autoencoder file. Raises `UserError` for other files."""
    _require(header, "autoencoder")
    shapes = _Shapes(header, header.tensors)
    ch, in_channels = shapes.of("encoder.conv_in.weight", 4)[:2]
    num_levels = shapes.count(r"encoder\.down\.(\d+)\.")
    ch_mult = tuple(shapes.of(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] // ch for level in range(num_levels))
    config = _Config(header)
    return AutoencoderParams(
        resolution=config.integer("resolution", 256),
        in_channels=in_channels,
        ch=ch,
        out_ch=shapes.of("decoder.conv_out.weight", 4)[0],
        ch_mult=ch_mult,
        num_res_blocks=shapes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        z_channels=shapes.of("decoder.conv_in.weight", 4)[1],
        scale_factor=config.number("scale_factor", 0.3611),
        shift_factor=config.number("shift_factor", 0.1159),
    )


def clip_params(header: Header) -> ClipParams:
    """The sizes of a CLIP text encoder file; its heads have 64 dimensions unless the file's metadata says otherwise."""
    _require(header, "clip_l")
    prefix = "text_model." if "text_model.embeddings.token_embedding.weight" in header.tensors else ""
    shapes = _Shapes(header, header.tensors)
    vocab_size, hidden_size = shapes.matrix(f"{prefix}embeddings.token_embedding.weight")
    config = _Config(header)
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
    _require(header, "t5xxl")
    shapes = _Shapes(header, header.tensors)
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
    config = _Config(header)
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


class _Shapes:
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


class _Config:
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
        sizes = _sizes(value)
        if not sizes or 0 in sizes:
            raise self._wrong(name, value, "a list of whole numbers, 1 or more")
        return sizes

    def _wrong(self, name: str, value: object, expected: str) -> UserError:
        return UserError(f"{name} is {value!r}; it must be {expected}", self._where)
