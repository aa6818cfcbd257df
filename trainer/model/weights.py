"""Model files to modules: built without memory, then filled tensor by tensor from the mapped file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from trainer.model.autoencoder import AutoEncoder
from trainer.model.flux import Flux
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    ALL_IN_ONE_PARTS,
    COMFYUI_PREFIX,
    Header,
    autoencoder_params,
    clip_params,
    flux_params,
    noun,
    read_header,
    t5_params,
)

# What published files hold beside the encoder: the other half of a whole model, and old buffers.
_CLIP_EXTRAS: Final = ("text_projection.", "logit_scale", "vision_model.", "visual_projection.")
_T5_EXTRAS: Final = ("decoder.", "lm_head.")

PlaceTensor = Callable[[str], torch.device | str]


def load_flux(
    path: Path, dtype: torch.dtype, device: torch.device | str, *, device_of: PlaceTensor | None = None
) -> Flux:
    """The transformer in `path`, frozen, in `dtype` on `device`.

    `device_of` may give another device for single parameters, by state-dict name, so that blocks which are to be swapped
    never pass through the accelerator. Raises `UserError` when the file is not a whole FLUX.1 model.
    """
    header = read_header(path)
    params = flux_params(header)
    with torch.device("meta"):
        model = Flux(params)

    def rename(name: str) -> str | None:
        return None if name.startswith(ALL_IN_ONE_PARTS) else name.removeprefix(COMFYUI_PREFIX)

    _fill(model, header, rename, dtype, device_of or (lambda _: device))
    return model.eval()


def load_autoencoder(path: Path, dtype: torch.dtype, device: torch.device | str) -> AutoEncoder:
    """The autoencoder in `path`, frozen, in `dtype` on `device`."""
    header = read_header(path)
    params = autoencoder_params(header)
    with torch.device("meta"):
        model = AutoEncoder(params)
    _fill(model, header, lambda name: name, dtype, lambda _: device)
    return model.eval()


def load_clip_l(
    path: Path, dtype: torch.dtype, device: torch.device | str, activation: str = "quick_gelu"
) -> CLIPTextModel:
    """The CLIP-L text encoder in `path`, frozen.

    `activation` is `quick_gelu`, which the published model was trained with, or `gelu`, which the reference trainer uses.
    """
    header = read_header(path)
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

    def rename(name: str) -> str | None:
        if name.startswith(_CLIP_EXTRAS) or name.endswith("position_ids"):
            return None
        bare = name.removeprefix("text_model.")
        return f"text_model.{bare}" if keeps_prefix else bare

    _fill(model, header, rename, dtype, lambda _: device)
    for module in model.modules():
        position_ids = getattr(module, "position_ids", None)
        if isinstance(position_ids, Tensor):
            module.position_ids = torch.arange(params.max_position_embeddings, device=device)[None]
    return model.eval()


def load_t5xxl(path: Path, dtype: torch.dtype, device: torch.device | str) -> T5EncoderModel:
    """The T5 encoder in `path`, frozen, in `dtype` on `device`."""
    header = read_header(path)
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
    embedding = "shared.weight" if "shared.weight" in header.tensors else "encoder.embed_tokens.weight"

    def rename(name: str) -> str | None:
        if name == embedding:
            return "shared.weight"
        if name == "encoder.embed_tokens.weight" or name.startswith(_T5_EXTRAS):
            return None
        return name

    # One embedding under two names: both must go on being the same parameter.
    model.encoder.embed_tokens = model.shared
    _fill(model, header, rename, dtype, lambda _: device)
    return model.eval()


def _fill(
    model: nn.Module,
    header: Header,
    rename: Callable[[str], str | None],
    dtype: torch.dtype,
    device_of: PlaceTensor,
) -> None:
    """Give every parameter of `model`, which is on the meta device, its tensor from the file, frozen.

    `rename` maps a name in the file to the model's, None for tensors to leave out. The file and the model must match name
    by name and shape by shape. One tensor at a time is in memory twice.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sources = {
        target: (name, info.shape) for name, info in header.tensors.items() if (target := rename(name)) is not None
    }
    _check_match(header, expected, sources)
    try:
        with safe_open(str(header.path), framework="pt", device="cpu") as file:
            for target, (source, _) in sources.items():
                stored = cast("Tensor", file.get_tensor(source))
                _set_parameter(model, target, _place(stored, dtype, torch.device(device_of(target))))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"this file cannot be read ({error})", str(header.path), "Download it again, or check the disk."
        ) from error


def _check_match(
    header: Header, expected: dict[str, tuple[int, ...]], sources: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    missing = [name for name in expected if name not in sources]
    unexpected = [source for target, (source, _) in sources.items() if target not in expected]
    misshapen = [
        f"{source} {list(shape)} instead of {list(expected[target])}"
        for target, (source, shape) in sources.items()
        if target in expected and shape != expected[target]
    ]
    parts = [
        f"{len(names)} {text} ({_some(names)})"
        for names, text in (
            (missing, "tensors are missing"),
            (unexpected, "tensors do not belong to it"),
            (misshapen, "tensors have another shape"),
        )
        if names
    ]
    if parts:
        raise UserError(
            f"this looks like {noun(header)}, but " + ", ".join(parts),
            str(header.path),
            "The file is incomplete or of a variant that is not supported; use the published one.",
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."


def _place(stored: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`stored`, which lies in the mapped file, as a tensor of its own.

    The mapped bytes start anywhere, so even an unchanged tensor is copied: aligned memory gives the same results for the
    same weights whatever file they came from. What travels to another device is the smaller of the two types.
    """
    if device.type == "cpu":
        return stored.to(dtype) if stored.dtype != dtype else stored.clone()
    if stored.dtype.itemsize < dtype.itemsize:
        return stored.to(device).to(dtype)
    return stored.to(dtype).to(device)


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, parameter_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    setattr(owner, parameter_name, nn.Parameter(tensor, requires_grad=False))
