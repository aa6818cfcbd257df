"""The rules between options: which of them cannot stand together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from trainer.schema.base import Problem, UserError
from trainer.schema.hub_place import REPO_TYPES, is_repo_id, parse_hub_place
from trainer.schema.lora_spec import spec_from_network_args
from trainer.schema.network_rules import network_contradictions
from trainer.schema.optimizer_rules import optimizer_problems
from trainer.schema.options import Options
from trainer.schema.options_data import CHANGES_PIXELS, SIZE_STEP
from trainer.schema.swap_counts import chosen_swap, max_blocks_to_swap

# The published transformer's depth; a pruned one has less.
_FLUX_DEPTH: Final = (19, 38)
_COMPILERS: Final = ("eager", "aot_eager", "inductor")
_MAX_NAME_BYTES: Final = 150
"""File systems take 255; step, time and the mark of an unfinished file come on top."""


def broken_rules(options: Options, explicit: frozenset[str]) -> Iterator[tuple[tuple[str, ...], Problem]]:
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
    yield from optimizer_problems(options, explicit)


def _contradictions(options: Options, explicit: frozenset[str]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(names, what, hint) of each contradiction. The first name is the option to change."""
    if options.cache_latents or options.cache_latents_to_disk:
        for name, effect in CHANGES_PIXELS.items():
            if getattr(options, name):
                what = f"{name} {effect} in every step, which cache_latents rules out"
                yield (name, "cache_latents"), what, "Turn one of the two off."
    if needs_huber_schedule(options) and options.huber_schedule == "snr" and "huber_schedule" in explicit:
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
    if options.log_with in ("tensorboard", "all") and options.logging_dir is None:
        yield ("logging_dir", "log_with"), f"log_with {options.log_with} needs logging_dir", "Give the log folder."
    if options.huggingface_repo_type not in (None, *REPO_TYPES):
        yield (
            ("huggingface_repo_type",),
            f"huggingface_repo_type is {options.huggingface_repo_type}; it must be model, dataset or space",
            "Leave it out for a LoRA.",
        )
    if options.huggingface_repo_id is not None and not is_repo_id(options.huggingface_repo_id):
        yield (
            ("huggingface_repo_id",),
            f"huggingface_repo_id is {options.huggingface_repo_id}; it must be owner/name",
            "Such as your-name/my-lora.",
        )
    if options.resume_from_huggingface and options.resume is not None:
        try:
            parse_hub_place(options.resume)
        except ValueError as error:
            yield (
                ("resume", "resume_from_huggingface"),
                f"resume is {options.resume.as_posix()}, which is no place on the hub: {error}",
                "Such as your-name/my-lora/cat-step00000100-state.",
            )
    for name, format_name in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if getattr(options, name) and options.mixed_precision != format_name:
            yield (
                (name, "mixed_precision"),
                f"{name} needs mixed_precision {format_name}, and it is {options.mixed_precision}",
                f"Add --mixed_precision={format_name}, or leave {name} out.",
            )
    if options.base_storage not in (None, "fp8") and (options.fp8_base or options.fp8_base_unet):
        name = "fp8_base" if options.fp8_base else "fp8_base_unet"
        yield (
            ("base_storage", name),
            f"base_storage is {options.base_storage}, but {name} asks for fp8",
            "Leave one of the two out.",
        )
    yield from _memory_contradictions(options)
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
    if chosen_swap(options.blocks_to_swap) > largest:
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


def _memory_contradictions(options: Options) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Those between the levers that trade memory for time."""
    is_lycoris = options.network_module == "lycoris.kohya"
    if options.offload_modulation is not None and is_lycoris:
        yield (
            ("offload_modulation", "network_module"),
            "lycoris.kohya computes with the modulation weights itself, so that they must be on the device",
            "Leave offload_modulation out.",
        )
    if options.offload_modulation == "file" and options.base_weights:
        yield (
            ("offload_modulation", "base_weights"),
            "offload_modulation file reads the model's file in every step, in which base_weights are not merged",
            "Use --offload_modulation=host.",
        )
    if compiles(options) and options.dynamo_backend not in _COMPILERS:
        yield (
            ("dynamo_backend", "torch_compile"),
            f"dynamo_backend {options.dynamo_backend} cannot compile a training of blocks with LoRA",
            "Use --dynamo_backend=inductor.",
        )
    if compiles(options) and is_lycoris:
        yield (
            ("torch_compile", "network_module"),
            "torch_compile cannot compile lycoris.kohya",
            "Leave one of the two out.",
        )
    swaps = options.blocks_to_swap == "auto" or chosen_swap(options.blocks_to_swap) > 0
    if compiles(options) and swaps and (not options.gradient_checkpointing or options.checkpoint_blocks is not None):
        yield (
            ("torch_compile", "blocks_to_swap", "gradient_checkpointing", "checkpoint_blocks"),
            "what torch_compile makes keeps a block's weights for its backward pass, and swapped blocks leave before it",
            "Turn on gradient_checkpointing for all blocks, or swap none.",
        )


def compiles(options: Options) -> bool:
    return options.torch_compile and options.dynamo_backend != "no"


def needs_huber_schedule(options: Options) -> bool:
    return options.loss_type in ("huber", "smooth_l1")
