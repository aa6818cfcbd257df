"""Model files to modules: built without memory, then filled tensor by tensor from the mapped files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor, nn

from trainer.model.autoencoder import AutoEncoder
from trainer.model.chroma import Chroma
from trainer.model.flux import Flux
from trainer.model.host_linear import Bring, HostLinear, keep_modulation_on_host
from trainer.model.mapped_file import DTYPES, MappedFile
from trainer.model.storage_cache import CachedWeights, StorageCache
from trainer.model.stored_linear import PackedStorage, StoredLinear, use_storage
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    ClipParams,
    Header,
    T5Params,
    autoencoder_params,
    clip_params,
    flux_params,
    t5_params,
)
from trainer.schema.chroma_header import chroma_params
from trainer.schema.key_plans import (
    Piece,
    Plan,
    PlannedTensor,
    autoencoder_plan,
    chroma_plan,
    clip_plan,
    flux_plan,
    t5_plan,
)
from trainer.schema.stored_scales import FP8, fp8_parts
from trainer.schema.weight_files import read_weights

if TYPE_CHECKING:
    # Seconds to import, which tools for LoRA files do without.
    from transformers import CLIPTextModel, T5EncoderModel

PlaceTensor = Callable[[str], torch.device | str]
FileStorage = Literal["file"]
ChangeOf = Callable[[str], Callable[[Tensor], Tensor] | None]
"""For a module's path what is to be made of its weight in float32, or None."""


@dataclass(frozen=True)
class ModulationOnHost:
    """The blocks' modulation weights are kept off the device, and `bring` brings each when it is used.

    With `maps_file` they are not in memory at all but read from the model's file, those that it has in the type that is
    computed in; the others are in main memory.
    """

    bring: Bring
    maps_file: bool


_NUMBERS_AT_ONCE: Final = 1 << 20
"""Of a tensor, so many numbers are read and converted at once; 4 MB in float32."""


def load_flux(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    device_of: PlaceTensor | None = None,
    storage: PackedStorage | FileStorage | None = None,
    change_of: ChangeOf | None = None,
    cache: StorageCache | None = None,
    modulation: ModulationOnHost | None = None,
) -> Flux:
    """The transformer that `path` names (a file, a folder, a hub id in the cache), frozen, in `dtype` on `device`.

    `device_of` may give another device for single parameters, by state-dict name, so that blocks which are to be swapped
    do not stay on the accelerator. With `storage` the blocks' Linears are stored in that form, one after the other while
    they are read, which is computed on `device`; `change_of` gives what is made of each of these before, and
    `cache` keeps them for the next time. With the storage `file` those of them that the file has in fp8 stay so, whatever
    the others are, and the last two are not asked. `modulation` keeps the blocks' modulation weights off the device. Raises `UserError` when the file is not a whole FLUX.1 model.
    """
    header = read_weights(path, "flux")
    with torch.device("meta"):
        model = Flux(flux_params(header))
    _fill_transformer(
        model, header, flux_plan(header), dtype, torch.device(device), device_of, storage, change_of, cache, modulation
    )
    return model.eval()


def load_chroma(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    device_of: PlaceTensor | None = None,
    storage: PackedStorage | FileStorage | None = None,
    change_of: ChangeOf | None = None,
    cache: StorageCache | None = None,
) -> Chroma:
    """The Chroma transformer that `path` names; as `load_flux`."""
    header = read_weights(path, "chroma")
    with torch.device("meta"):
        model = Chroma(chroma_params(header))
    _fill_transformer(
        model, header, chroma_plan(header), dtype, torch.device(device), device_of, storage, change_of, cache
    )
    return model.eval()


def _fill_transformer(
    model: Flux | Chroma,
    header: Header,
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    device_of: PlaceTensor | None,
    storage: PackedStorage | FileStorage | None,
    change_of: ChangeOf | None,
    cache: StorageCache | None,
    modulation: ModulationOnHost | None = None,
) -> None:
    stored: dict[str, StoredLinear] = {}
    if storage == "file":
        cache = change_of = None
        for kind in ("double_blocks", "single_blocks"):
            paths = {
                planned.target.removeprefix(f"{kind}.").removesuffix(".weight")
                for planned in plan
                if planned.target.startswith(f"{kind}.") and _fp8_of(planned) is not None
            }
            found = use_storage(model.get_submodule(kind), "fp8", with_modulation=modulation is None, only=paths)
            stored |= {f"{kind}.{path}.weight": linear for path, linear in found.items()}
    elif storage is not None:
        # What the file has in fp8 stays so; in fewer bits than it has them, modulation layers are not stored.
        with_modulation = storage == "fp8" and fp8_parts(header)[1] and modulation is None
        for kind in ("double_blocks", "single_blocks"):
            found = use_storage(model.get_submodule(kind), storage, with_modulation=with_modulation)
            stored |= {f"{kind}.{path}.weight": linear for path, linear in found.items()}
    with contextlib.ExitStack() as stack:
        cached = stack.enter_context(cache.open(header, storage)) if cache and storage and storage != "file" else None
        _fill(
            model,
            header,
            plan,
            dtype,
            device_of or (lambda _: device),
            stored=stored,
            packs_on=device,
            change_of=change_of,
            cached=cached,
            on_host={} if modulation is None or isinstance(model, Chroma) else _on_host(model, modulation),
            maps=modulation is not None and modulation.maps_file,
        )
    if cached is not None and not cached.is_whole:
        cached.keep({name.removesuffix(".weight"): linear for name, linear in stored.items()})


def load_autoencoder(path: Path, dtype: torch.dtype, device: torch.device | str) -> AutoEncoder:
    """The autoencoder that `path` names, frozen, in `dtype` on `device`."""
    header = read_weights(path, "autoencoder")
    with torch.device("meta"):
        model = AutoEncoder(autoencoder_params(header))
    _fill(model, header, autoencoder_plan(header), dtype, lambda _: device)
    return model.eval()


def load_clip_l(
    path: Path, dtype: torch.dtype, device: torch.device | str, activation: str = "quick_gelu"
) -> CLIPTextModel:
    """The CLIP-L text encoder that `path` names, frozen.

    `activation` is `quick_gelu`, which the published model was trained with, or `gelu`, which the reference trainer uses.
    """
    header = read_weights(path, "clip_l")
    params = clip_params(header)
    model = empty_clip_l(params, activation)
    # transformers 4 keeps the published prefix `text_model.` in its parameter names, transformers 5 has dropped it.
    keeps_prefix = any(name.startswith("text_model.") for name, _ in model.named_parameters())

    prefix = "text_model." if keeps_prefix else ""
    _fill(model, header, clip_plan(header), dtype, lambda _: device, prefix=prefix)
    for module in model.modules():
        position_ids = getattr(module, "position_ids", None)
        if isinstance(position_ids, Tensor):
            module.position_ids = torch.arange(params.max_position_embeddings, device=device)[None]
    return model.eval()


def empty_clip_l(params: ClipParams, activation: str = "quick_gelu") -> CLIPTextModel:
    """A CLIP-L text encoder of these sizes without weights: its parameters are on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel  # noqa: PLC0415 - takes seconds

    config = CLIPTextConfig(
        hidden_size=params.hidden_size,
        intermediate_size=params.intermediate_size,
        projection_dim=params.hidden_size,
        num_attention_heads=params.num_attention_heads,
        num_hidden_layers=params.num_hidden_layers,
        vocab_size=params.vocab_size,
        max_position_embeddings=params.max_position_embeddings,
        layer_norm_eps=params.layer_norm_eps,
        bos_token_id=params.vocab_size - 2,
        eos_token_id=params.eos_token_id,
        hidden_act=activation,
    )
    with torch.device("meta"):
        return CLIPTextModel(config)


def load_t5xxl(
    path: Path, dtype: torch.dtype, device: torch.device | str, *, layers_on: torch.device | str | None = None
) -> T5EncoderModel:
    """The T5 encoder that `path` names, frozen, in `dtype` on `device`; with `layers_on` its layers' Linears are there."""
    header = read_weights(path, "t5xxl")
    model = empty_t5xxl(t5_params(header))
    # One embedding under two names: both must go on being the same parameter.
    model.encoder.embed_tokens = model.shared
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _fill(
        model,
        header,
        t5_plan(header),
        dtype,
        lambda name: layers_on if layers_on is not None and name in linears else device,
    )
    return model.eval()


def empty_t5xxl(params: T5Params) -> T5EncoderModel:
    """A T5 encoder of these sizes without weights: its parameters are on the meta device."""
    from transformers import T5Config, T5EncoderModel  # noqa: PLC0415 - takes seconds

    config = T5Config(
        d_model=params.d_model,
        d_ff=params.d_ff,
        d_kv=params.d_kv,
        num_heads=params.num_heads,
        num_layers=params.num_layers,
        vocab_size=params.vocab_size,
        relative_attention_num_buckets=params.num_buckets,
        relative_attention_max_distance=params.max_distance,
        layer_norm_epsilon=params.layer_norm_epsilon,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        return T5EncoderModel(config)


def _fill(
    model: nn.Module,
    header: Header,
    plan: Plan,
    dtype: torch.dtype,
    device_of: PlaceTensor,
    *,
    prefix: str = "",
    stored: Mapping[str, StoredLinear] | None = None,
    packs_on: torch.device | None = None,
    change_of: ChangeOf | None = None,
    cached: CachedWeights | None = None,
    on_host: Mapping[str, HostLinear] | None = None,
    maps: bool = False,
) -> None:
    """Give every parameter of `model`, which is on the meta device, its tensor from the files, frozen.

    `prefix` stands before the plan's names in the module. Beside the model, no more than a piece of one tensor is in
    memory, or of those weights that `stored` names one in float32 on the device `packs_on`. The weights `on_host` are in
    main memory; with `maps` in the file, where that has them as they are computed with.
    """
    stored, on_host = stored or {}, on_host or {}
    expected = {
        name: (stored[name].out_features, stored[name].in_features) if name in stored else tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.removesuffix("_scale") not in stored or name in stored
    }
    if expected != {prefix + planned.target: planned.shape for planned in plan}:
        raise AssertionError("the plan does not describe this module")
    with ExitStack() as stack:
        try:
            files = {path: stack.enter_context(closing(MappedFile(path))) for path in header.files}
        except OSError as error:
            raise UserError(
                f"this file cannot be read ({error.strerror or error})", str(header.path), "Check the disk."
            ) from error
        # In the order of the file, which is how disks are fast.
        for planned in sorted(plan, key=lambda entry: _place_in_files(header, entry)):
            device = torch.device("cpu" if planned.target in on_host else device_of(planned.target))
            if maps and planned.target in on_host and _is_as_computed(planned, dtype):
                (piece,) = planned.pieces
                on_host[planned.target].set_mapped(*files[header.file_of(piece.source)].lasting(piece.info))
                continue
            if planned.target in stored:
                path = planned.target.removesuffix(".weight")
                taken = None if cached is None else cached.take(path, stored[planned.target])
                if taken is not None:
                    weight, scale = taken
                    stored[planned.target].set_stored(weight.to(device), scale.to(device))
                    continue
                change = None if change_of is None else change_of(path)
                _fill_stored(files, header, planned, stored[planned.target], device, packs_on or device, change)
                continue
            _set_parameter(model, prefix + planned.target, _read_parameter(files, header, planned, dtype, device))


def _on_host(model: Flux, modulation: ModulationOnHost) -> dict[str, HostLinear]:
    found = keep_modulation_on_host(model, modulation.bring)
    return {f"{path}.weight": linear for path, linear in found.items()}


def _is_as_computed(planned: PlannedTensor, dtype: torch.dtype) -> bool:
    """Whether a file has this tensor in one piece and in `dtype`."""
    pieces = planned.pieces
    if len(pieces) != 1 or pieces[0].scale is not None:
        return False
    info, rows = pieces[0].info, pieces[0].rows
    return DTYPES.get(info.dtype) is dtype and rows in (None, (0, info.shape[0])) and info.shape == planned.shape


def read_planned(header: Header, planned_tensors: Iterable[PlannedTensor]) -> dict[str, Tensor]:
    """Some parameters without their model, in main memory and in the type that they are stored in, by name."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(closing(MappedFile(path))) for path in header.files}
        for planned in planned_tensors:
            dtype = DTYPES[planned.pieces[0].info.dtype]
            tensors[planned.target] = _read_parameter(files, header, planned, dtype, torch.device("cpu"))
    return tensors


def _place_in_files(header: Header, planned: PlannedTensor) -> tuple[Path, int]:
    first = planned.pieces[0]
    return header.file_of(first.source), first.info.start


def _read_parameter(
    files: dict[Path, MappedFile], header: Header, planned: PlannedTensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A parameter in `dtype` on `device`, its pieces read into their places."""
    value = torch.empty(planned.shape, dtype=dtype, device=device)
    rows = value.view(planned.shape[0], -1)
    start = 0
    for piece in planned.pieces:
        first, end = piece.rows or (0, piece.info.shape[0])
        _read_piece(files, header, piece, (first, end), rows[start : start + end - first])
        start += end - first
    return value


def _fill_stored(
    files: dict[Path, MappedFile],
    header: Header,
    planned: PlannedTensor,
    linear: StoredLinear,
    device: torch.device,
    packs_on: torch.device,
    change: Callable[[Tensor], Tensor] | None,
) -> None:
    """The weight in its stored form. Numbers that the file has in that form already are taken over, with their scales."""
    fp8 = _fp8_of(planned)
    if change is None and linear.storage == "fp8" and fp8 is not None:
        raw = dataclasses.replace(planned, pieces=tuple(_without_scale(piece) for piece in planned.pieces))
        scale = torch.ones(linear.out_features)
        start = 0
        for piece in planned.pieces:
            first, end = piece.rows or (0, piece.info.shape[0])
            given = _read_scale(files, header, piece)
            if given is not None:
                scale[start : start + end - first] = given if len(given) == 1 else given[first:end]
            start += end - first
        weight = _read_parameter(files, header, raw, DTYPES[fp8], device)
    else:
        dense = _read_parameter(files, header, planned, torch.float32, packs_on)
        weight, scale = linear.pack(dense if change is None else change(dense))
    linear.set_stored(weight.to(device), scale.to(device))


def _fp8_of(planned: PlannedTensor) -> str | None:
    """The type of fp8 that the file has all of a matrix in, with scales or without; None for any other."""
    types = {_read_as(piece) for piece in planned.pieces}
    return types.pop() if len(planned.shape) == 2 and len(types) == 1 and types <= FP8 else None


def _read_as(piece: Piece) -> str:
    return piece.info.dtype if piece.scale is None else piece.scale.read_as


def _without_scale(piece: Piece) -> Piece:
    return dataclasses.replace(piece, info=dataclasses.replace(piece.info, dtype=_read_as(piece)), scale=None)


def _read_scale(files: dict[Path, MappedFile], header: Header, piece: Piece) -> Tensor | None:
    """One number, or one for each row, in float32; None where the piece has none."""
    if piece.scale is None:
        return None
    file = files[header.file_of(piece.scale.name)]
    return file.read(header.tensors[piece.scale.name]).float().reshape(-1)


def _read_piece(
    files: dict[Path, MappedFile], header: Header, piece: Piece, rows: tuple[int, int], target: Tensor
) -> None:
    """The piece's `rows` into `target` (R, C), some at a time. Scaled numbers are multiplied in float32 and rounded once.

    What travels to another device is the smaller of the two types.
    """
    file, device = files[header.file_of(piece.source)], target.device
    scale, read_as = _read_scale(files, header, piece), _read_as(piece)
    if scale is not None:
        scale = scale.to(device).reshape(-1, 1)
    stored_type = DTYPES[read_as]
    is_plain_copy = scale is None and stored_type is target.dtype and device.type == "cpu"
    num_rows = max(1, _NUMBERS_AT_ONCE // target.shape[1])
    for first in range(*rows, num_rows):
        some = first, min(first + num_rows, rows[1])
        place = target[some[0] - rows[0] : some[1] - rows[0]]
        if is_plain_copy:
            file.read_into(place, piece.info, some)
            continue
        stored = file.read(piece.info, read_as, some).view(place.shape)
        if scale is not None:
            stored = stored.to(device).to(torch.float32).mul_(scale if len(scale) == 1 else scale[slice(*some)])
        elif stored_type.itemsize > target.dtype.itemsize:
            stored = stored.to(target.dtype)
        place.copy_(stored.to(device))


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, parameter_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    setattr(owner, parameter_name, nn.Parameter(tensor, requires_grad=False))
