"""Replay files: one batch with everything random drawn, and the LoRA as it was, to train on again.

Training writes one when a loss is no number; `python -m trainer replay` reads it. A safetensors file with
`in.latents` and `in.noise` (B, 16, h, w), `in.timesteps` (B) in [0, 1000], `in.clip_pooled` (B, V), `in.t5_out` (B, L, D),
`in.t5_attn_mask` (B, L) with 1 = real token (all, when absent; the padding that Chroma sees is added), `in.loss_weights`
(B) (1, when absent), `in.noisy` as `in.latents` (made of the others, when absent), `in.mask` (B, 1, h, w) of the loss and
`in.preserved` (B), 1 for samples whose target is the prediction without the LoRA (none, when absent), and `init.<key>`
for each tensor of the LoRA (drawn from the seed, when there are none). The metadata's `options` are the words of a
command line, as JSON.

B batch, h w latent size, L text tokens, D T5 width, V CLIP width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.schema.base import Problem, UserError
from trainer.schema.chroma_header import VISIBLE_PADDING
from trainer.schema.cli import to_argv
from trainer.schema.options import GROUPS, Options
from trainer.train.checkpoint import write_file
from trainer.train.conditioning import show_padding
from trainer.train.objective import FlowBatch

LATENT_CHANNELS: Final = 16

GROUPS_OF_A_STEP: Final = ("model", "network", "optimizer", "flow", "memory", "course")
"""The groups of options that may decide what a step computes."""
_NOT_OF_A_STEP: Final = frozenset(
    {
        *("clip_l", "t5xxl", "ae", "network_weights", "max_train_epochs", "max_train_steps"),
        # Of such a run too the transformer is replayed: its text is recorded as the trained encoders gave it.
        "network_train_text_encoder_only",
    }
)
_REQUIRED: Final = ("latents", "noise", "timesteps", "clip_pooled", "t5_out")
_OPTIONAL: Final = ("t5_attn_mask", "loss_weights", "noisy", "mask", "preserved")
_NUM_DIMENSIONS: Final[Mapping[str, int]] = {
    "latents": 4,
    "noise": 4,
    "noisy": 4,
    "timesteps": 1,
    "clip_pooled": 2,
    "t5_out": 3,
    "t5_attn_mask": 2,
    "loss_weights": 1,
    "mask": 4,
    "preserved": 1,
}


@dataclass(frozen=True)
class Recording:
    """What a replay file holds; see the top of the file. `options` are words of a command line."""

    latents: Tensor
    noise: Tensor
    timesteps_1000: Tensor
    clip_pooled: Tensor
    t5_out: Tensor
    t5_attn_mask: Tensor
    loss_weights: Tensor
    noisy: Tensor | None
    mask: Tensor | None
    preserved: Tensor | None
    initial: Mapping[str, Tensor]
    options: tuple[str, ...]


def write_recording(path: Path, batch: FlowBatch, initial: Mapping[str, Tensor], options: Options) -> None:
    """Writes a replay file for `batch`, whole or not at all. Raises `UserError` when the disk does not take it."""
    text = batch.text
    mask = torch.ones(text.txt.shape[:2], dtype=torch.int64) if text.mask is None else text.mask
    if options.model_type == "chroma":
        # The batch's mask shows padding, which a replay adds. A caption that fills the length loses its last token here
        # and gets it back there.
        mask = show_padding(mask, -VISIBLE_PADDING)
    tensors = {
        "in.latents": batch.latents,
        "in.noise": batch.noise,
        "in.timesteps": 1000 * batch.sigmas,
        "in.clip_pooled": text.vec,
        "in.t5_out": text.txt,
        "in.t5_attn_mask": mask,
        "in.loss_weights": batch.loss_weights,
        "in.noisy": batch.noisy,
        **({} if batch.mask is None else {"in.mask": batch.mask}),
        **({} if batch.preserved is None else {"in.preserved": batch.preserved.to(torch.uint8)}),
        **{f"init.{key}": tensor for key, tensor in initial.items()},
    }
    # A copy of each: safetensors refuses tensors that share memory.
    on_host = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    metadata = {"format": "pt", "options": json.dumps(_words_of_a_step(options))}
    write_file(path, safetensors.torch.save(on_host, metadata=metadata))


def _words_of_a_step(options: Options) -> list[str]:
    """The options that decide what a step computes."""
    names = {name for group in GROUPS_OF_A_STEP for name in GROUPS[group].model_fields} - _NOT_OF_A_STEP
    values = {name: getattr(options, name) for name in names}
    chosen = {name: value for name, value in values.items() if value is not None}
    model = options.pretrained_model_name_or_path
    if isinstance(model, Path):
        chosen["pretrained_model_name_or_path"] = model.resolve()
    return to_argv(Options.model_validate(chosen))


def read_options_of(path: Path) -> tuple[str, ...]:
    """The words of a command line that a replay file brings along; none where it has no options."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = cast("dict[str, str] | None", file.metadata())
        words = cast("object", json.loads((metadata or {}).get("options", "[]")))
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(words, list):
        raise _unreadable(path, ValueError("its options are no list"))
    return tuple(str(word) for word in cast("list[object]", words))


def read_recording(path: Path) -> Recording:
    """Reads a replay file. Raises `UserError` (exit code 3) with everything that is wrong with it."""
    options = read_options_of(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    # Copies: tensors inside a mapped file lie at any address, and the address decides about the last bit of a sum.
    given = {key.removeprefix("in."): value.clone() for key, value in tensors.items() if key.startswith("in.")}
    initial = {key.removeprefix("init."): value.clone() for key, value in tensors.items() if key.startswith("init.")}
    problems = _problems(given, str(path))
    if problems:
        raise UserError.many(problems, exit_code=3)
    text_shape = given["t5_out"].shape[:2]
    noisy, mask, preserved = given.get("noisy"), given.get("mask"), given.get("preserved")
    return Recording(
        latents=given["latents"].float(),
        noise=given["noise"].float(),
        timesteps_1000=given["timesteps"].float(),
        clip_pooled=given["clip_pooled"],
        t5_out=given["t5_out"],
        t5_attn_mask=given.get("t5_attn_mask", torch.ones(text_shape, dtype=torch.int64)),
        loss_weights=given.get("loss_weights", torch.ones(given["latents"].shape[0])).float(),
        noisy=None if noisy is None else noisy.float(),
        mask=None if mask is None else mask.float(),
        preserved=None if preserved is None else preserved.bool(),
        initial=initial,
        options=options,
    )


def _problems(given: Mapping[str, Tensor], where: str) -> list[Problem]:
    missing = [f"in.{name}" for name in _REQUIRED if name not in given]
    if missing:
        return [Problem(f"this is no replay file: {', '.join(missing)} are missing", where, field="input")]
    unknown = [f"in.{name}" for name in given if name not in (*_REQUIRED, *_OPTIONAL)]
    if unknown:
        return [Problem(f"the replay file holds {', '.join(unknown)}, which mean nothing here", where, field="input")]
    flat = [
        Problem(f"in.{name} has {tensor.dim()} dimensions; it must have {_NUM_DIMENSIONS[name]}", where, field="input")
        for name, tensor in given.items()
        if tensor.dim() != _NUM_DIMENSIONS[name]
    ]
    if flat:
        return flat
    latents = given["latents"]
    batch, text_tokens = latents.shape[0], given["t5_out"].shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "noise": tuple(latents.shape),
        "noisy": tuple(latents.shape),
        "timesteps": (batch,),
        "loss_weights": (batch,),
        "mask": (batch, 1, *latents.shape[2:]),
        "preserved": (batch,),
        "clip_pooled": (batch, given["clip_pooled"].shape[1]),
        "t5_out": (batch, *given["t5_out"].shape[1:]),
        "t5_attn_mask": (batch, text_tokens),
    }
    problems = [
        Problem(f"in.{name} is {list(given[name].shape)}; it must be {list(shape)}", where, field="input")
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    if latents.shape[1] != LATENT_CHANNELS or latents.shape[2] % 2 or latents.shape[3] % 2:
        what = f"in.latents are {list(latents.shape)}; they must be [B, {LATENT_CHANNELS}, h, w] with even h and w"
        problems.append(Problem(what, where, field="input"))
    return problems


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the replay file cannot be read ({error})", str(path), "Give a .safetensors file.", field="input")
