"""Model files to modules: built without memory, then filled tensor by tensor from the mapped files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from trainer.model.autoencoder import AutoEncoder
from trainer.model.flux import Flux
from trainer.model.mapped_file import DTYPES, MappedFile
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import Header, autoencoder_params, clip_params, flux_params, t5_params
from trainer.schema.key_plans import Piece, Plan, PlannedTensor, autoencoder_plan, clip_plan, flux_plan, t5_plan
from trainer.schema.weight_files import read_weights

PlaceTensor = Callable[[str], torch.device | str]


def load_flux(
    path: Path, dtype: torch.dtype, device: torch.device | str, *, device_of: PlaceTensor | None = None
) -> Flux:
    """The transformer that `path` names (a file, a folder, a hub id in the cache), frozen, in `dtype` on `device`.

    `device_of` may give another device for single parameters, by state-dict name, so that blocks which are to be swapped
    never pass through the accelerator. Raises `UserError` when the file is not a whole FLUX.1 model.
    """
    header = read_weights(path, "flux")
    with torch.device("meta"):
        model = Flux(flux_params(header))
    _fill(model, header, flux_plan(header), dtype, device_of or (lambda _: device))
    return model.eval()


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
        model = CLIPTextModel(config)
    # transformers 4 keeps the published prefix `text_model.` in its parameter names, transformers 5 has dropped it.
    keeps_prefix = any(name.startswith("text_model.") for name, _ in model.named_parameters())

    prefix = "text_model." if keeps_prefix else ""
    _fill(model, header, clip_plan(header), dtype, lambda _: device, prefix=prefix)
    for module in model.modules():
        position_ids = getattr(module, "position_ids", None)
        if isinstance(position_ids, Tensor):
            module.position_ids = torch.arange(params.max_position_embeddings, device=device)[None]
    return model.eval()


def load_t5xxl(path: Path, dtype: torch.dtype, device: torch.device | str) -> T5EncoderModel:
    """The T5 encoder that `path` names, frozen, in `dtype` on `device`."""
    header = read_weights(path, "t5xxl")
    params = t5_params(header)
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
        model = T5EncoderModel(config)
    # One embedding under two names: both must go on being the same parameter.
    model.encoder.embed_tokens = model.shared
    _fill(model, header, t5_plan(header), dtype, lambda _: device)
    return model.eval()


def _fill(
    model: nn.Module,
    header: Header,
    plan: Plan,
    dtype: torch.dtype,
    device_of: PlaceTensor,
    *,
    prefix: str = "",
) -> None:
    """Give every parameter of `model`, which is on the meta device, its tensor from the files, frozen.

    `prefix` stands before the plan's names in the module. One parameter at a time is in memory twice.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
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
            device = torch.device(device_of(planned.target))
            tensors = [_read_piece(files, header, piece, dtype, device) for piece in planned.pieces]
            value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            _set_parameter(model, prefix + planned.target, value.reshape(planned.shape))


def read_planned(header: Header, planned_tensors: Iterable[PlannedTensor]) -> dict[str, Tensor]:
    """Some parameters without their model, in main memory and in the type that they are stored in, by name."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(closing(MappedFile(path))) for path in header.files}
        for planned in planned_tensors:
            dtype = DTYPES[planned.pieces[0].info.dtype]
            pieces = [_read_piece(files, header, piece, dtype, torch.device("cpu")) for piece in planned.pieces]
            tensors[planned.target] = torch.cat(pieces).reshape(planned.shape)
    return tensors


def _place_in_files(header: Header, planned: PlannedTensor) -> tuple[Path, int]:
    first = planned.pieces[0]
    return header.file_of(first.source), first.info.start


def _read_piece(
    files: dict[Path, MappedFile],
    header: Header,
    piece: Piece,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A piece in `dtype` on `device`. Scaled numbers are multiplied in float32 and rounded once.

    What travels to another device is the smaller of the two types.
    """
    file = files[header.file_of(piece.source)]
    if piece.scale is None:
        stored = file.read(piece.info)
        narrow = stored.dtype.itemsize < dtype.itemsize
        value = stored.to(device).to(dtype) if narrow else stored.to(dtype).to(device)
    else:
        scale_info = header.tensors[piece.scale.name]
        scale = files[header.file_of(piece.scale.name)].read(scale_info).to(device, torch.float32)
        stored = file.read(piece.info, piece.scale.read_as).to(device).to(torch.float32)
        # One number, or one for each row.
        value = stored.mul_(scale.reshape(-1, *[1] * (stored.dim() - 1))).to(dtype)
    return value if piece.rows is None else value[piece.rows[0] : piece.rows[1]]


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, parameter_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    setattr(owner, parameter_name, nn.Parameter(tensor, requires_grad=False))
