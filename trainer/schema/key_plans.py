"""For every parameter of a model, which tensors of its files it is made of: decided from the header, before loading.

A plan that exists is complete: each parameter has its tensors, each tensor its place, all shapes and types fit. Loading
only carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    ModelKind,
    autoencoder_params,
    clip_params,
    flux_params,
    t5_params,
)
from trainer.schema.key_names import (
    DIFFUSERS_ATTENTION,
    OLD_DIFFUSERS_ATTENTION,
    NameParts,
    Part,
    autoencoder_in_diffusers,
    flux_in_diffusers,
    same_name,
)
from trainer.schema.model_kinds import (
    ALL_IN_ONE_PARTS,
    COMFYUI_PREFIX,
    DTYPE_NAMES,
    is_diffusers_autoencoder,
    is_diffusers_flux,
    noun,
    strip_prefix,
)
from trainer.schema.model_shapes import Shape, autoencoder_shapes, clip_shapes, flux_shapes, t5_shapes
from trainer.schema.safetensors_header import Header, TensorInfo
from trainer.schema.stored_scales import FP8, PLAIN, Scale, is_side_tensor, stored_scales

# What published files hold beside the encoder: the other half of a whole model, old buffers, a tokenizer.
_CLIP_EXTRAS: Final = ("text_projection.", "logit_scale", "vision_model.", "visual_projection.")
_T5_EXTRAS: Final = ("decoder.", "lm_head.", "spiece_model", "logit_scale")


@dataclass(frozen=True)
class Piece:
    """One tensor of a file on its way into a parameter.

    `rows` (first, end) are the rows taken, None for all. `scale` multiplies the stored numbers, None for plain ones.
    """

    source: str
    info: TensorInfo
    rows: tuple[int, int] | None = None
    scale: Scale | None = None


@dataclass(frozen=True)
class PlannedTensor:
    """A parameter: its pieces one below the other, seen in its shape."""

    target: str
    shape: Shape
    pieces: tuple[Piece, ...]


Plan = tuple[PlannedTensor, ...]


def flux_plan(header: Header) -> Plan:
    """The plan of a FLUX.1 transformer in any layout. Raises `UserError` for a file that is not exactly that."""
    params = flux_params(header)
    shapes = flux_shapes(params)
    if is_diffusers_flux(strip_prefix(header.tensors)):
        return _plan(header, _without_prefix(header), shapes, flux_in_diffusers, width=params.hidden_size)
    names = _without_prefix(header)
    return _plan(header, names, shapes, lambda name: (Part(_norm_name(name, names)),), width=params.hidden_size)


def autoencoder_plan(header: Header) -> Plan:
    """The plan of a FLUX.1 autoencoder in any layout."""
    params = autoencoder_params(header)
    parts: NameParts = same_name
    if is_diffusers_autoencoder(header.tensors):
        is_old = "encoder.mid_block.attentions.0.query.weight" in header.tensors
        parts = autoencoder_in_diffusers(
            len(params.ch_mult), OLD_DIFFUSERS_ATTENTION if is_old else DIFFUSERS_ATTENTION
        )
    return _plan(header, {name: name for name in header.tensors}, autoencoder_shapes(params), parts)


def clip_plan(header: Header) -> Plan:
    """The plan of a CLIP text encoder; parameters are named without `text_model.`, as the newest files do."""
    names = {
        name.removeprefix("text_model."): name
        for name in header.tensors
        if not name.startswith(_CLIP_EXTRAS) and not name.endswith("position_ids")
    }
    return _plan(header, names, clip_shapes(clip_params(header)), same_name)


def t5_plan(header: Header) -> Plan:
    """The plan of a T5 encoder. Its embedding has two names in files, of which one is enough."""
    names = {name: name for name in header.tensors if not name.startswith(_T5_EXTRAS)}
    second = names.pop("encoder.embed_tokens.weight", None)
    if second is not None:
        names.setdefault("shared.weight", second)
    return _plan(header, names, t5_shapes(t5_params(header)), same_name)


PLANS: Final[Mapping[ModelKind, Callable[[Header], Plan]]] = {
    "flux": flux_plan,
    "autoencoder": autoencoder_plan,
    "clip_l": clip_plan,
    "t5xxl": t5_plan,
}


def _without_prefix(header: Header) -> dict[str, str]:
    """Names without ComfyUI's prefix -> names in the file; other models' parts of an all-in-one file are left out."""
    return {name.removeprefix(COMFYUI_PREFIX): name for name in header.tensors if not name.startswith(ALL_IN_ONE_PARTS)}


def _norm_name(name: str, names: Mapping[str, str]) -> str:
    """Newer ComfyUI versions write the norms' `scale` as `weight`."""
    other = f"{name.removesuffix('.scale')}.weight"
    return other if name.endswith(".scale") and name not in names and other in names else name


def _plan(
    header: Header, names: Mapping[str, str], shapes: Mapping[str, Shape], parts_of: NameParts, *, width: int = 0
) -> Plan:
    """`names` are the model's names (in the file's layout) -> names in the file; everything in it must find its place."""
    scales = stored_scales(header)
    planned: list[PlannedTensor] = []
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for target, shape in shapes.items():
        parts = parts_of(target)
        pieces: list[Piece] = []
        for part, (expected, rows) in zip(parts, _expected(shape, parts, width), strict=True):
            source = names.get(part.name)
            if source is None:
                missing.append(part.name)
                continue
            if source not in used and not _fits(header.tensors[source].shape, expected):
                misshapen.append(f"{source} {list(header.tensors[source].shape)} instead of {list(expected)}")
            used.add(source)
            _check_type(header, source, scales.get(source))
            pieces.append(Piece(source, header.tensors[source], rows, scales.get(source)))
        planned.append(PlannedTensor(target, shape, tuple(pieces)))
    unexpected = [source for source in names.values() if source not in used and not _belongs(source, used)]
    _raise_if_wrong(header, missing, unexpected, misshapen)
    return tuple(planned)


def _expected(shape: Shape, parts: Sequence[Part], width: int) -> list[tuple[Shape, tuple[int, int] | None]]:
    """The whole shape of each part's tensor, and the rows that are taken of it."""
    rows, rest = shape[0], shape[1:]
    if len(parts) == 1:
        return [(shape, None)]
    if parts[0].half is not None:
        middle = rows // 2
        return [(shape, (0, middle) if part.half == 0 else (middle, rows)) for part in parts]
    sizes = [rows // 3] * 3 if len(parts) == 3 else [width] * 3 + [rows - 3 * width]
    return [((size, *rest), None) for size in sizes]


def _fits(stored: Shape, expected: Shape) -> bool:
    """A 1x1 convolution may be stored as the matrix that it is."""
    return stored == expected or (len(expected) == 4 and expected[2:] == (1, 1) and stored == expected[:2])


def _check_type(header: Header, source: str, scale: Scale | None) -> None:
    stored = header.tensors[source].dtype if scale is None else scale.read_as
    if stored not in PLAIN and stored not in FP8:
        raise UserError(
            f"the tensor {source!r} is stored as {DTYPE_NAMES.get(stored, stored)}, which is not supported",
            str(header.path),
            "Use the bf16, fp16, fp8 or scaled fp8 file.",
        )


def _belongs(source: str, used: set[str]) -> bool:
    """Whether a tensor that is no parameter describes how a parameter is stored."""
    return is_side_tensor(source) and ("." not in source.removeprefix(COMFYUI_PREFIX) or _layer_weight(source) in used)


def _layer_weight(side_tensor: str) -> str:
    return f"{side_tensor.rpartition('.')[0]}.weight"


def _raise_if_wrong(
    header: Header, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]
) -> None:
    found = [
        f"{len(names)} {text} ({_some(names)})"
        for names, text in (
            (missing, "tensors are missing"),
            (unexpected, "tensors do not belong to it"),
            (misshapen, "tensors have another shape"),
        )
        if names
    ]
    if found:
        raise UserError(
            f"this looks like {noun(header)}, but " + ", ".join(found),
            str(header.path),
            "The file is incomplete or of a variant that is not supported; use the published one.",
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."
