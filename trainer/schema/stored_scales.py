"""How a file stores its weights: plain, or as 8-bit numbers with scales beside them.

Two published layouts of scaled fp8 are read, both of ComfyUI:

- the older: a tensor `scaled_fp8` marks the file, and `<layer>.scale_weight` is the layer's scale;
- the newer: `<layer>.weight_scale`, with the layer's format as JSON in the file's metadata (`_quantization_metadata`)
  or, byte by byte, in a tensor `<layer>.comfy_quant`.

In both, weight = stored number * scale. Scales of a layer's *input* (`scale_input`, `input_scale`) are not used: they
serve multiplication in 8 bits, and training multiplies in the asked type. Sources: ComfyUI's QUANTIZATION.md and the
conversion of the older layout in its utils.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from trainer.schema.base import UserError
from trainer.schema.safetensors_header import Header, TensorInfo

MARKER: Final = "scaled_fp8"
FP8: Final = frozenset({"F8_E4M3", "F8_E5M2"})
PLAIN: Final = frozenset({"F64", "F32", "F16", "BF16"})
_SCALE_SUFFIXES: Final = (".scale_weight", ".weight_scale")
_SIDE_SUFFIXES: Final = (*_SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
_FP8_FORMATS: Final[Mapping[str, str]] = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_REFUSED_SUFFIXES: Final[Mapping[str, str]] = {
    ".weight_scale_2": "nvfp4 (4-bit numbers with block scales)",
    ".pre_quant_scale": "smoothed 8-bit numbers",
    ".absmax": "bitsandbytes 4-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".wscales": "SVDQuant 4-bit",
    ".qweight": "GPTQ or AWQ 4-bit",
    ".weight_scale_inv": "fp8 with block scales",
}
_USE_OTHER: Final = "Use the bf16, fp16, plain fp8 or scaled fp8 file."
_FP8_TYPES: Final = {"F8_E4M3", "F8_E5M2"}
_BLOCK_WEIGHT: Final = re.compile(r"(?:^|[._])blocks\.\d+\..*\.weight$")
_MODULATION_WEIGHT: Final = re.compile(r"\.(?:(?:img_|txt_)?mod(?:ulation)?\.lin|norm1?(?:_context)?\.linear)\.weight$")
_MAX_QUANT_BYTES: Final = 4096


@dataclass(frozen=True)
class Scale:
    """The scale of one weight: the name of its tensor, and the type that the weight's bytes are to be read as."""

    name: str
    read_as: str


def is_side_tensor(name: str) -> bool:
    """Whether a tensor belongs to the storage of another one rather than to the model."""
    return name.endswith(_SIDE_SUFFIXES) or name.rpartition(".")[2] == MARKER


def fp8_parts(header: Header) -> tuple[bool, bool]:
    """Whether a transformer's file has the Linears of all blocks in one type of fp8, and whether their modulation, too."""
    scales = stored_scales(header)
    linears: set[str] = set()
    modulation: set[str] = set()
    for name, info in header.tensors.items():
        if len(info.shape) == 2 and _BLOCK_WEIGHT.search(name):
            read_as = scales[name].read_as if name in scales else info.dtype
            (modulation if _MODULATION_WEIGHT.search(name) else linears).add(read_as)
    are_fp8 = len(linears) == 1 and linears <= _FP8_TYPES
    return are_fp8, are_fp8 and modulation == linears


def stored_scales(header: Header) -> dict[str, Scale]:
    """The scale of each weight that has one, by the weight's name in the file.

    Raises `UserError` when the file is stored in a way that cannot be read, or a scale is missing or misshapen.
    """
    where = str(header.path)
    for name in header.tensors:
        for suffix, layout in _REFUSED_SUFFIXES.items():
            if name.endswith(suffix):
                raise UserError(f"this file is stored as {layout}, which is not supported", where, _USE_OTHER)
    formats = dict(_layer_formats(header))
    for layer, stored in formats.items():
        if stored not in _FP8_FORMATS:
            raise UserError(f"the layer {layer!r} is stored as {stored}, which is not supported", where, _USE_OTHER)
    scales: dict[str, Scale] = {}
    for name, info in header.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix != "weight":
            continue
        scale = next((layer + ending for ending in _SCALE_SUFFIXES if layer + ending in header.tensors), None)
        if scale is not None:
            read_as = _FP8_FORMATS[formats[layer]] if layer in formats and info.dtype == "U8" else info.dtype
            scales[name] = Scale(scale, read_as)
            _check_scale(header.tensors[scale], info, scale, name, where)
    _check_complete(header, scales, formats)
    return scales


def _layer_formats(header: Header) -> Iterator[tuple[str, str]]:
    """Layer and format of the newer layout."""
    try:
        stated: object = json.loads(header.metadata.get("_quantization_metadata", "{}"))
    except (ValueError, RecursionError):
        stated = None
    layers = cast("dict[str, object]", stated).get("layers", {}) if isinstance(stated, dict) else None
    if not isinstance(layers, dict):
        raise UserError("the metadata on its 8-bit layers is damaged", str(header.path), "Download the file again.")
    entries = list(cast("dict[str, object]", layers).items())
    for name, info in header.tensors.items():
        if name.endswith(".comfy_quant"):
            entries.append((name.removesuffix(".comfy_quant"), _read_entry(header, name, info)))
    prefixed = {name.rpartition(".")[0] for name in header.tensors}
    for layer, entry in entries:
        stored = cast("dict[str, object]", entry).get("format") if isinstance(entry, dict) else entry
        if not isinstance(stored, str):
            raise UserError(f"how {layer!r} is stored cannot be read", str(header.path), "Download the file again.")
        # Converters write the layers' names with or without ComfyUI's prefix.
        full = next((name for name in (layer, f"model.diffusion_model.{layer}") if name in prefixed), layer)
        yield full, stored


def _read_entry(header: Header, name: str, info: TensorInfo) -> object:
    """The JSON in a `.comfy_quant` tensor."""
    if info.dtype != "U8" or not 0 < info.end - info.start <= _MAX_QUANT_BYTES:
        return None
    try:
        with Path(header.file_of(name)).open("rb") as file:
            data_start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(data_start + info.start)
            return cast("object", json.loads(file.read(info.end - info.start)))
    except (OSError, ValueError, RecursionError):
        return None


def _check_scale(scale: TensorInfo, weight: TensorInfo, scale_name: str, name: str, where: str) -> None:
    """One scale for the whole weight, or one for each of its rows."""
    rows = weight.shape[0] if weight.shape else 1
    if scale.dtype not in PLAIN or scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise UserError(
            f"the scale {scale_name!r} ({scale.dtype}, shape {list(scale.shape)}) does not fit {name!r} "
            f"(shape {list(weight.shape)}); one number, or one for each row, was expected",
            where,
            _USE_OTHER,
        )


def _check_complete(header: Header, scales: Mapping[str, Scale], formats: Mapping[str, str]) -> None:
    """A file that says its layers are scaled must hold the scale of each."""
    has_marker = any(name.rpartition(".")[2] == MARKER for name in header.tensors)
    is_marked = has_marker or any(scale.name.endswith(".scale_weight") for scale in scales.values())
    missing = [f"{layer}.weight" for layer in formats if f"{layer}.weight" not in scales]
    if is_marked:
        # Every Linear has a bias or lies in a text encoder; embeddings and norms are stored without a scale.
        missing += [
            name
            for name, info in header.tensors.items()
            if info.dtype in FP8 and name.endswith(".weight") and name not in scales and _is_linear(name, info)
        ]
    if missing:
        raise UserError(
            f"this is a scaled fp8 file, but {len(missing)} of its layers have no scale ({missing[0]!r})",
            str(header.path),
            "Without its scale a weight would be wrong. Download the file again, or use another one.",
        )


def _is_linear(name: str, info: TensorInfo) -> bool:
    is_embedding = any(part in name for part in ("embed_tokens.", "shared.", "_embedding.", "relative_attention_bias."))
    return len(info.shape) == 2 and not is_embedding
