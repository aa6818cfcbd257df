"""All options together: the model `Options`, the status of every option, and the rules between options."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Union, cast

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from trainer.schema.base import Opt, Problem, UserError, nearest
from trainer.schema.lora_spec import spec_from_network_args
from trainer.schema.memory import max_blocks_to_swap
from trainer.schema.network_rules import network_advice, network_contradictions
from trainer.schema.optimizer_args import parse_optimizer_args
from trainer.schema.option_table import NOT_SUPPORTED, OPEN_TEXT, REFUSED_VALUES, OptionStatus, ValueType
from trainer.schema.options_data import SIZE_STEP, CacheOptions, DatasetOptions
from trainer.schema.options_model import MemoryOptions, ModelOptions, NetworkOptions, OptionGroup
from trainer.schema.options_training import (
    CourseOptions,
    FlowOptions,
    LogOptions,
    MetadataOptions,
    OptimizerOptions,
    SampleOptions,
    SavingOptions,
)


class Options(
    ModelOptions,
    MemoryOptions,
    NetworkOptions,
    DatasetOptions,
    CacheOptions,
    CourseOptions,
    OptimizerOptions,
    FlowOptions,
    SavingOptions,
    SampleOptions,
    LogOptions,
    MetadataOptions,
):
    """Every supported option. Names and defaults are the reference trainer's.

    Made directly, only each value by itself is checked; `read_options` also knows the rules between options.
    """


GROUPS: Final[Mapping[str, type[OptionGroup]]] = MappingProxyType(
    {
        "model": ModelOptions,
        "dataset": DatasetOptions,
        "network": NetworkOptions,
        "course": CourseOptions,
        "optimizer": OptimizerOptions,
        "flow": FlowOptions,
        "memory": MemoryOptions,
        "cache": CacheOptions,
        "saving": SavingOptions,
        "samples": SampleOptions,
        "logs": LogOptions,
        "metadata": MetadataOptions,
    }
)
"""Section name -> group, in the order in which options are shown and written."""

OUR_OPTIONS: Final = frozenset(
    {
        "caption_variants",
        "clip_l_tokenizer",
        "t5xxl_tokenizer",
        "clip_l_activation",
        "device",
        "lora_form",
        "round_timesteps",
        "run_dir",
    }
)
"""Options that the reference trainer does not have."""

# The published transformer's depth; a pruned one has less.
_FLUX_DEPTH: Final = (19, 38)
_MAX_NAME_BYTES: Final = 150
"""File systems take 255; step, time and the mark of an unfinished file come on top."""


# ------------------------------------------------------------------------------------------------------------ status


def opt_of(name: str) -> Opt:
    """What the help and the form say about a supported option."""
    return next(entry for entry in Options.model_fields[name].metadata if isinstance(entry, Opt))


def _parts(annotation: object) -> Iterator[object]:
    """The alternatives of a type, with `Annotated` and nested unions taken apart."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _parts(typing.get_args(annotation)[0])
    elif origin is Union or origin is types.UnionType:
        for part in typing.get_args(annotation):
            yield from _parts(part)
    elif annotation is not type(None):
        yield annotation


def _literals(annotation: object) -> Iterator[str]:
    for part in _parts(annotation):
        if typing.get_origin(part) is Literal:
            yield from (str(value) for value in typing.get_args(part))


def _status_of_field(name: str, info: FieldInfo) -> OptionStatus:
    parts = list(_parts(info.annotation))
    is_list = typing.get_origin(parts[0]) is tuple
    if is_list:
        parts = list(_parts(typing.get_args(parts[0])[0]))
    refused = REFUSED_VALUES.get(name, {})
    choices: tuple[str, ...] = ()
    value_type: ValueType
    if typing.get_origin(parts[0]) is Literal:
        value_type = "text"
        if name not in OPEN_TEXT:
            choices = (*(str(value) for value in typing.get_args(parts[0])), *refused)
    elif bool in parts:
        value_type = "flag"
    elif int in parts and float in parts:
        value_type = "steps"
    elif float in parts:
        value_type = "number"
    elif int in parts:
        value_type = "integer"
    else:
        value_type = "path" if Path in parts else "text"
    return OptionStatus(
        "supported",
        value_type,
        choices=choices,
        is_list=is_list,
        default=cast("object", info.get_default()),
        is_ours=name in OUR_OPTIONS,
        refused_values=MappingProxyType(refused),
    )


STATUS: Final[Mapping[str, OptionStatus]] = MappingProxyType(
    {
        **{
            name: _status_of_field(name, Options.model_fields[name])
            for group in GROUPS.values()
            for name in group.model_fields
        },
        **NOT_SUPPORTED,
    }
)
"""Every option of the reference trainer and of ours, by name."""


OPEN_TEXT_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {name: tuple(_literals(Options.model_fields[name].annotation)) for name in sorted(OPEN_TEXT)}
)
"""What may be given where the reference takes any text."""


# ----------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Given:
    """An option's value as it was given, as text or typed, and the place that an error message names."""

    value: object
    where: str


@dataclass(frozen=True)
class Reading:
    """`options` is None exactly when there are problems. `explicit` holds the supported options that were given."""

    options: Options | None
    explicit: frozenset[str]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def read_options(given: Mapping[str, Given]) -> Reading:
    """Check values by known names (`STATUS`): each by itself, then the rules between options.

    Refused options and values are problems, options without effect are notes.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    values: dict[str, object] = {}
    for name, entry in given.items():
        status = STATUS[name]
        value = _plain(status, entry.value)
        if status.status == "supported":
            problem = _refused_value(name, status, value, entry.where)
            if problem is not None:
                problems.append(problem)
            elif value is not None:
                values[name] = value
            continue
        typed, mistake = _typed(status, value)
        if mistake is not None:
            problems.append(Problem(f"{name} is {shown(value)}; it {mistake}", entry.where, field=name))
        elif typed == status.default:
            continue
        elif status.status == "inert":
            notes.append(f"{name} has no effect: {status.reason}")
        else:
            problems.append(Problem(*refusal(name, status.reason, entry.where), name))
    bad = {problem.field for problem in problems}
    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        for name, problem in _field_problems(error, values, given).items():
            problems.append(problem)
            bad.add(name)
        # The rest is right by itself, so its rules can be checked too.
        options = Options.model_validate({name: value for name, value in values.items() if name not in bad})
    explicit = frozenset(values)
    for names, problem in _broken_rules(options, explicit):
        if not bad & set(names):
            place = next((given[name].where for name in names if name in given), problem.where)
            problems.append(Problem(problem.what, place, problem.hint, problem.field))
    if problems:
        return Reading(None, explicit, tuple(problems), ())
    options, corrections = _corrected(options, explicit)
    notes = [*corrections, *notes, *_advice(options, explicit)]
    if "use_8bit_adam" in explicit:
        explicit |= {"optimizer_type"}
    return Reading(options, explicit, (), tuple(notes))


def shown(value: object) -> str:
    """A value as a person would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return " ".join(shown(item) for item in cast("Sequence[object]", value)) or "empty"
    return str(value) if value != "" else "empty"


def _plain(status: OptionStatus, value: object) -> object:
    """The value, None for an empty text where that means that nothing was given."""
    if not isinstance(value, str):
        return value
    if not value.strip() and (status.default is None or status.value_type in ("number", "integer", "steps")):
        return None
    return value


def _refused_value(name: str, status: OptionStatus, value: object, where: str) -> Problem | None:
    if isinstance(value, bool) and status.value_type in ("integer", "number", "steps"):
        return Problem(f"{name} is {shown(value)}; it must be {_kind_of_value(status)}", where, field=name)
    if not isinstance(value, str):
        return None
    for refused, reason in status.refused_values.items():
        if value == refused or (name in OPEN_TEXT and value.casefold() == refused.casefold()):
            what, _, hint = f"{name} {value} {reason}".partition("; ")
            return Problem(what, where, _sentence(hint), name)
    return None


def refusal(name: str, reason: str, where: str) -> tuple[str, str, str | None]:
    """(what, where, hint) of an option or key that is not carried out, from its reason in the table."""
    what, _, hint = reason.partition("; ")
    # A reason is "it is not supported yet; ..." or a sentence about the feature behind the option.
    text = f"{name} {what.removeprefix('it ')}" if what.startswith("it ") else f"{name} cannot be used: {what}"
    return text, where, _sentence(hint)


def _sentence(text: str) -> str | None:
    return f"{text[0].upper()}{text[1:]}." if text else None


def _typed(status: OptionStatus, value: object) -> tuple[object, str | None]:
    """The value of an option that is not carried out, as its type, or what is wrong with it."""
    if value is None:
        return status.default, None
    if status.is_list:
        items = cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else (value,)
        return (tuple(items) or None), None
    mistake = f"must be {_kind_of_value(status)}"
    if status.value_type == "flag":
        words = {"true": True, "1": True, "false": False, "0": False}
        typed = words.get(shown(value).strip().lower())
        return typed, mistake if typed is None else None
    if status.choices and shown(value) not in status.choices:
        return None, f"must be one of {', '.join(status.choices)}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        return None, mistake
    if status.value_type in ("text", "path"):
        return str(value), None
    try:
        number = float(str(value).removesuffix("%") if status.value_type == "steps" else str(value))
    except ValueError:
        return None, mistake
    return (None, mistake) if status.value_type == "integer" and not number.is_integer() else (number, None)


def _kind_of_value(status: OptionStatus) -> str:
    kinds = {
        "flag": "true or false",
        "text": "text",
        "path": "a path",
        "integer": "a whole number",
        "number": "a number",
        "steps": "a number of steps, or a part of the run such as 0.1 or 10%",
    }
    return f"{kinds[status.value_type]}{', or several' if status.is_list else ''}"


def _field_problems(
    error: ValidationError, values: Mapping[str, object], given: Mapping[str, Given]
) -> dict[str, Problem]:
    """The first problem of each option that pydantic found."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        if name in problems:
            continue
        value = values[name]
        hint: str | None = None
        if detail["type"] == "value_error":
            expected = str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
        else:
            expected = f"must be {_expected(name, detail['type'])}"
        if detail["type"] == "literal_error":
            near = nearest(str(value), _literals(Options.model_fields[name].annotation))
            hint = f"Did you mean {near}?" if near else None
        problems[name] = Problem(f"{name} is {shown(value)}; it {expected}", given[name].where, hint, name)
    return problems


def _expected(name: str, error_type: str) -> str:
    """What an option's value must be, after an error of pydantic's type `error_type`."""
    choices = tuple(_literals(Options.model_fields[name].annotation))
    if choices:
        return f"one of {', '.join(choices)}"
    if error_type == "string_too_short":
        return "at least one character"
    bounds = _bounds(Options.model_fields[name])
    if error_type in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return bounds or "0 or more"
    if error_type == "too_long":
        return "at most two numbers"
    kind = _kind_of_value(STATUS[name])
    return f"{kind}, {bounds}" if bounds else kind


def _bounds(info: FieldInfo) -> str | None:
    found: dict[str, Any] = {}
    for entry in info.metadata:
        for key in ("ge", "gt", "le", "lt"):
            if getattr(entry, key, None) is not None:
                found[key] = getattr(entry, key)
    if "ge" in found and "le" in found:
        return f"{found['ge']} to {found['le']}"
    if "ge" in found and "lt" in found:
        return f"at least {found['ge']} and below {found['lt']}"
    if "ge" in found:
        return f"{found['ge']} or more"
    return f"above {found['gt']}" if "gt" in found else None


# ------------------------------------------------------------------------------------------------------------- rules


def _broken_rules(options: Options, explicit: frozenset[str]) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Each broken rule between options: the options that it is about, and the problem."""
    for names, what, hint in _contradictions(options, explicit):
        yield names, Problem(what, f"--{names[0]}", hint, names[0])
    for names, what, hint in network_contradictions(options):
        yield names, Problem(what, f"--{names[0]}", hint, names[0])
    if options.network_args or options.network_module == "networks.oft_flux":
        try:
            spec_from_network_args(
                options.network_args or (), network_alpha=options.network_alpha, network_module=options.network_module
            )
        except UserError as error:
            yield from ((("network_args", "network_module"), problem) for problem in error.problems)
    if options.optimizer_args:
        kind = "AdamW8bit" if options.use_8bit_adam else options.optimizer_type
        try:
            parse_optimizer_args(options.optimizer_args, kind)
        except UserError as error:
            yield from ((("optimizer_args", "optimizer_type"), problem) for problem in error.problems)


def _contradictions(options: Options, explicit: frozenset[str]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(names, what, hint) of each contradiction. The first name is the option to change."""
    if (options.cache_latents or options.cache_latents_to_disk) and options.random_crop:
        yield (
            ("random_crop", "cache_latents"),
            "random_crop cuts pictures anew in every step, which cache_latents rules out",
            "Turn one of the two off.",
        )
    if options.lr_scheduler == "constant" and options.lr_warmup_steps:
        yield (
            ("lr_warmup_steps", "lr_scheduler"),
            "lr_scheduler constant has no warm-up",
            "Use constant_with_warmup, or leave lr_warmup_steps at 0.",
        )
    if _is_huber(options) and options.huber_schedule == "snr" and "huber_schedule" in explicit:
        yield (
            ("huber_schedule", "loss_type"),
            f"huber_schedule snr does not exist for FLUX, and loss_type {options.loss_type} needs a schedule",
            "Use --huber_schedule=constant or exponential.",
        )
    lowest, highest = options.min_timestep or 0, options.max_timestep or 1000
    if lowest >= highest:
        yield (
            ("min_timestep", "max_timestep"),
            f"min_timestep is {lowest}, which is not below max_timestep {highest}",
            "They are the ends of the range that is trained, of 1000.",
        )
    if options.use_8bit_adam and "optimizer_type" in explicit and options.optimizer_type != "AdamW8bit":
        yield (
            ("use_8bit_adam", "optimizer_type"),
            f"use_8bit_adam contradicts optimizer_type {options.optimizer_type}",
            "Leave use_8bit_adam out.",
        )
    if options.log_with is not None and options.logging_dir is None:
        yield ("logging_dir", "log_with"), f"log_with {options.log_with} needs logging_dir", "Give the log folder."
    if options.min_bucket_reso > options.max_bucket_reso:
        yield (
            ("min_bucket_reso", "max_bucket_reso"),
            f"min_bucket_reso {options.min_bucket_reso} is above max_bucket_reso {options.max_bucket_reso}",
            "Lower the one or raise the other.",
        )
    if options.bucket_reso_steps % SIZE_STEP:
        yield (
            ("bucket_reso_steps",),
            f"bucket_reso_steps is {options.bucket_reso_steps}; it must be a multiple of {SIZE_STEP}",
            "64 is usual.",
        )
    largest = max_blocks_to_swap(*_FLUX_DEPTH)
    if (options.blocks_to_swap or 0) > largest:
        yield (
            ("blocks_to_swap",),
            f"blocks_to_swap is {options.blocks_to_swap}; it must be 0 to {largest}",
            f"FLUX.1 has {_FLUX_DEPTH[0]} double and {_FLUX_DEPTH[1]} single blocks.",
        )
    if options.output_name is not None and {"/", "\\"} & set(options.output_name):
        yield (
            ("output_name",),
            f"output_name is {options.output_name}; it must be a file's name without a folder",
            "The folder is given as output_dir.",
        )
    if options.output_name is not None and len(options.output_name.encode()) > _MAX_NAME_BYTES:
        yield ("output_name",), f"output_name must be at most {_MAX_NAME_BYTES} bytes long", "Give a shorter name."


def _is_huber(options: Options) -> bool:
    return options.loss_type in ("huber", "smooth_l1")


def _corrected(options: Options, explicit: frozenset[str]) -> tuple[Options, list[str]]:
    """The options with old names and implied settings carried over, and a line for each change."""
    changes: dict[str, object] = {}
    notes: list[str] = []

    def change(note: str, **values: object) -> None:
        changes.update(values)
        notes.append(note)

    if options.network_module is None:
        change("network_module is not given: networks.lora_flux is used", network_module="networks.lora_flux")
    elif options.network_module == "networks.lora":
        change(
            "networks.lora is taken for FLUX's LoRA; its name is networks.lora_flux",
            network_module="networks.lora_flux",
        )
    if options.use_8bit_adam:
        change(
            "use_8bit_adam is an old name of --optimizer_type=AdamW8bit",
            use_8bit_adam=False,
            optimizer_type="AdamW8bit",
        )
    if _is_huber(options) and options.huber_schedule == "snr":
        # Of the two that exist for FLUX it is the one with snr's form: from 1 without noise down to huber_c.
        change(
            f"huber_schedule is exponential: the default, snr, does not exist for FLUX (loss_type {options.loss_type})",
            huber_schedule="exponential",
        )
    if options.split_mode:
        swap = options.blocks_to_swap or 18
        change(f"split_mode is an old name: blocks_to_swap is {swap}", split_mode=False, blocks_to_swap=swap)
    if options.model_type == "chroma":
        for note, values in _chroma_settings(options, explicit):
            change(note, **values)
    if options.cache_latents_to_disk and not options.cache_latents:
        change("cache_latents_to_disk turns cache_latents on", cache_latents=True)
    if options.cache_text_encoder_outputs_to_disk and not options.cache_text_encoder_outputs:
        change(
            "cache_text_encoder_outputs_to_disk turns cache_text_encoder_outputs on", cache_text_encoder_outputs=True
        )
    extension = options.caption_extension
    if options.caption_extention is not None:
        extension = options.caption_extention
        change("caption_extention is an old name of caption_extension", caption_extention=None)
    if not extension.startswith("."):
        extension = f".{extension}"
    changes["caption_extension"] = extension
    for name, value in (
        ("sample_every_n_steps", options.sample_every_n_steps),
        ("sample_every_n_epochs", options.sample_every_n_epochs),
    ):
        if value is not None and value <= 0:
            change(f"{name} {value} means no samples", **{name: None})
    return options.model_copy(update=changes), notes


def _chroma_settings(options: Options, explicit: frozenset[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """What Chroma leaves no choice about: a line for each, and the setting."""
    if options.clip_l is not None:
        yield "clip_l has no effect: Chroma has no CLIP-L", {"clip_l": None}
    if not options.network_train_unet_only:
        yield "Chroma has no CLIP-L: only the transformer is trained", {"network_train_unet_only": True}
    if not options.apply_t5_attn_mask:
        yield "Chroma always masks T5's padding: apply_t5_attn_mask is on", {"apply_t5_attn_mask": True}
    if "guidance_scale" not in explicit:
        yield "guidance_scale is 0, with which Chroma was made", {"guidance_scale": 0.0}


def _advice(options: Options, explicit: frozenset[str]) -> Iterable[str]:
    """One line for each setting that has no effect beside others."""
    if options.dataset_config is not None:
        for name in ("train_data_dir", "reg_data_dir"):
            if name in explicit and getattr(options, name) is not None:
                yield f"{name} has no effect beside dataset_config"
    if {"max_train_epochs", "max_train_steps"} <= explicit and options.max_train_epochs is not None:
        yield f"max_train_steps has no effect: max_train_epochs {options.max_train_epochs} wins"
    every_epochs, every_steps = options.sample_every_n_epochs, options.sample_every_n_steps
    if every_epochs is not None and every_steps is not None:
        yield "sample_every_n_steps has no effect: sample_every_n_epochs wins"
    if options.sample_prompts is None and (every_epochs or every_steps or options.sample_at_first):
        yield "no samples are made: sample_prompts is not given"
    caches_text = options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk
    if "caption_variants" in explicit and not caches_text:
        yield "caption_variants has no effect: without cache_text_encoder_outputs every step encodes its own texts"
    if options.model_type == "chroma" and options.guidance_scale != 0:
        yield f"guidance_scale is {options.guidance_scale:g}; Chroma was made with 0"
    yield from network_advice(options, explicit)
