"""What the form asks: the options it shows, taken from the one definition of all options, and a few questions of its own.

A field is named after its option, so that values, problems and presets bind by name.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Union

from fluxgui.language import language, say, texts
from trainer.schema.base import Opt
from trainer.schema.options import Options

Kind = Literal["text", "path", "lines", "integer", "number", "choice", "flag"]

MODELS: Final = ("pretrained_model_name_or_path", "t5xxl", "clip_l", "ae")
TOKENIZERS: Final = ("clip_l_tokenizer", "t5xxl_tokenizer")
PICTURES: Final = ("image_dir", "trigger_word", "num_repeats")
LENGTH: Final = ("output_name", "max_train_epochs", "max_train_steps")
LEARNING: Final = ("network_dim", "network_alpha", "learning_rate", "resolution", "train_batch_size")
SAMPLES: Final = ("sample_prompt_lines", "sample_every_n_epochs", "sample_every_n_steps", "sample_at_first")
SAVING: Final = ("save_every_n_epochs", "save_every_n_steps", "save_precision")
MEMORY: Final = (
    "blocks_to_swap",
    "mixed_precision",
    "base_storage",
    "gradient_checkpointing",
    "cache_latents",
    "cache_latents_to_disk",
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
)
OPTIMIZER: Final = (
    "optimizer_type",
    "lr_scheduler",
    "lr_warmup_steps",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "network_dropout",
    "network_train_unet_only",
    "text_encoder_lr",
    "seed",
)
FLOW: Final = (
    "timestep_sampling",
    "discrete_flow_shift",
    "sigmoid_scale",
    "weighting_scheme",
    "model_prediction_type",
    "guidance_scale",
    "loss_type",
    "apply_t5_attn_mask",
    "t5xxl_max_token_length",
)
BUCKETS: Final = (
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_no_upscale",
    "flip_aug",
    "shuffle_caption",
    "caption_dropout_rate",
)
OTHER: Final = ("device", "more_options")

ALL_NAMES: Final = (
    *MODELS,
    *TOKENIZERS,
    *PICTURES,
    *LENGTH,
    *LEARNING,
    *SAMPLES,
    *SAVING,
    *MEMORY,
    *OPTIMIZER,
    *FLOW,
    *BUCKETS,
    *OTHER,
)
# What belongs to one project or one machine stays out of presets.
NOT_IN_PRESETS: Final = frozenset({*MODELS, *TOKENIZERS, "image_dir", "trigger_word", "output_name", "device"})
# These go into the dataset file, where the trainer looks first, under the names that it has there.
DATASET_NAMES: Final[Mapping[str, str]] = {
    "resolution": "resolution",
    "train_batch_size": "batch_size",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_no_upscale": "bucket_no_upscale",
    "flip_aug": "flip_aug",
    "shuffle_caption": "shuffle_caption",
    "caption_dropout_rate": "caption_dropout_rate",
}


@dataclass(frozen=True)
class Field:
    """One question of the form. `choices` only for kind "choice", `is_open` where they are not the only answers;
    `optional` when leaving it empty is an answer."""

    name: str
    kind: Kind
    label: str
    help: str
    default: object = None
    choices: tuple[str, ...] = ()
    optional: bool = True
    is_open: bool = False


_OWN_KINDS: Final[Mapping[str, Kind]] = {
    "image_dir": "path",
    "trigger_word": "text",
    "num_repeats": "integer",
    "sample_prompt_lines": "lines",
    "more_options": "lines",
}


def _own_field(name: str) -> Field:
    """A question of the form that is no option."""
    label, help_text = say(f"train.field_{name}"), say(f"train.field_{name}_help")
    if name == "num_repeats":
        return Field(name, _OWN_KINDS[name], label, help_text, 1, optional=False)
    return Field(name, _OWN_KINDS[name], label, help_text)


def make_fields() -> dict[str, Field]:
    """All fields of the form by name, in the order of the page."""
    return {name: _own_field(name) if name in _OWN_KINDS else option_field(name) for name in ALL_NAMES}


def option_field(name: str) -> Field:
    """The field of an option, with the label, help and type of its definition. Another language may have its own words."""
    info = Options.model_fields[name]
    opt = next(entry for entry in info.metadata if isinstance(entry, Opt))
    kind, choices, optional = _kind(info.annotation)
    label = f"{opt.label} ({opt.unit})" if opt.unit and opt.unit not in opt.label.lower() else opt.label
    is_open = kind == "choice" and str in _union_parts(info.annotation)
    words = texts(language(), "fields")
    label, help_text = words.get(name, label), words.get(f"{name}_help", opt.help)
    return Field(name, kind, label, help_text, info.get_default(), choices, optional, is_open)


def _kind(annotation: object) -> tuple[Kind, tuple[str, ...], bool]:
    parts = list(_union_parts(annotation))
    optional = type(None) in parts
    parts = [part for part in parts if part is not type(None)]
    if bool in parts:
        return "flag", (), optional
    if int in parts and len(parts) > 1 and float not in parts:
        return "text", (), optional  # a number or a word, such as auto
    if any(typing.get_origin(part) is Literal for part in parts):
        choices = tuple(str(value) for part in parts for value in typing.get_args(part))
        return "choice", choices, optional
    if parts == [int]:
        return "integer", (), optional
    if float in parts:
        return "number", (), optional
    if Path in parts:
        return "path", (), optional
    return "text", (), optional


def _union_parts(annotation: object) -> Iterable[object]:
    """The alternatives of a type, with `Annotated` and nested unions taken apart."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _union_parts(typing.get_args(annotation)[0])
    elif origin is Union or origin is types.UnionType:
        for part in typing.get_args(annotation):
            yield from _union_parts(part)
    else:
        yield annotation
