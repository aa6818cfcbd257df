"""The rules between the network's options, and what is worth saying about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.schema.base import UserError
from trainer.schema.lora_spec import LoraSpec, spec_from_network_args
from trainer.schema.network_args import SWITCHED_ON

if TYPE_CHECKING:
    from trainer.schema.options import Options

_REFERENCE_SWITCHES = ("split_qkv", "train_t5xxl", "enable_all_linear", "verbose")
_SELECTION = ("train_blocks", "train_double_block_indices", "train_single_block_indices", "in_dims", "network_reg_dims")


def spec_of(options: Options) -> LoraSpec:
    """The spec of the network options. Raises `UserError` (exit code 2) with every problem."""
    return spec_from_network_args(
        options.network_args or (),
        network_dim=options.network_dim,
        network_alpha=options.network_alpha,
        network_dropout=options.network_dropout,
        network_module=options.network_module,
    )


def options_spec(options: Options) -> LoraSpec | None:
    """The spec of the network options; None when they are wrong, which is told elsewhere."""
    try:
        return spec_of(options)
    except UserError:
        return None


def network_contradictions(options: Options) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(names, what, hint) of each contradiction. The first name is the option to change."""
    if options.dim_from_weights and options.network_weights is None:
        yield (
            ("dim_from_weights", "network_weights"),
            "dim_from_weights needs a LoRA file",
            "Give the file as network_weights.",
        )
    num_multipliers, num_files = len(options.base_weights_multiplier or ()), len(options.base_weights or ())
    if num_multipliers > num_files:
        yield (
            ("base_weights_multiplier", "base_weights"),
            f"base_weights_multiplier has {num_multipliers} numbers for {num_files} files of base_weights",
            "Give one number for each file.",
        )
    if options.network_train_unet_only and options.network_train_text_encoder_only:
        yield (
            ("network_train_text_encoder_only", "network_train_unet_only"),
            "network_train_text_encoder_only and network_train_unet_only leave nothing to train",
            "Give one of them.",
        )
    spec = options_spec(options)
    if spec is not None:
        yield from _spec_contradictions(options, spec)


def _spec_contradictions(options: Options, spec: LoraSpec) -> Iterator[tuple[tuple[str, ...], str, str]]:
    if spec.train_t5xxl and (options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk):
        yield (
            ("network_args", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
            "train_t5xxl trains T5, whose outputs cache_text_encoder_outputs keeps from before",
            "Turn one of the two off.",
        )
    if spec.train_t5xxl and options.network_train_unet_only:
        yield (
            ("network_args", "network_train_unet_only"),
            "train_t5xxl trains a text encoder, which network_train_unet_only rules out",
            "Leave one of the two out.",
        )
    if spec.kind != "lora":
        for name in ("scale_weight_norms", "dim_from_weights", "network_train_text_encoder_only"):
            if getattr(options, name):
                yield (
                    (name, "network_module"),
                    f"{name} belongs to LoRAs, which {options.network_module} does not train",
                    "Leave it out, or use networks.lora_flux.",
                )
    if spec.kind == "oft" and options.network_dropout:
        yield (
            ("network_dropout", "network_module"),
            "networks.oft_flux has no dropout",
            "Leave network_dropout out.",
        )
    if spec.pissa and options.scale_weight_norms is not None:
        yield (
            ("scale_weight_norms", "network_args"),
            "scale_weight_norms would scale what pissa begins with",
            "Leave one of the two out.",
        )


def network_advice(options: Options, explicit: frozenset[str]) -> Iterator[str]:
    """One line for each setting that has no effect, or trains badly."""
    yield from _given_twice(options)
    for pair in options.network_args or ():
        key, _, value = (piece.strip() for piece in pair.partition("="))
        if key in _REFERENCE_SWITCHES and value != "True" and value.lower() in SWITCHED_ON:
            yield f"{key}={value} of network_args switches it on; sd-scripts takes True alone, and leaves it off"
    spec = options_spec(options)
    if spec is None:
        return
    has_two_rates = options.text_encoder_lr is not None and len(options.text_encoder_lr) == 2
    if has_two_rates and not spec.train_t5xxl and not options.network_train_unet_only:
        yield "the second text_encoder_lr has no effect: T5 is not trained"
    if options.network_train_unet_only:
        yield from _rates_without_effect(options, "text_encoder_lr", "only the transformer is trained")
    if options.network_train_text_encoder_only:
        yield from _rates_without_effect(options, "unet_lr", "only the text encoders are trained")
    for blocks, other in (("single", "double"), ("double", "single")):
        key = f"train_{other}_block_indices"
        if spec.train_blocks == blocks and _is_given(options, key) and not options.dim_from_weights:
            yield f"{key} has no effect: train_blocks is {blocks}"
    if options.dim_from_weights:
        selected = [key for key in _SELECTION if any(pair.startswith(key) for pair in options.network_args or ())]
        selected += [*spec.type_dims, *(name for name in ("network_dim", "network_alpha") if name in explicit)]
        if selected:
            have = "has" if len(selected) == 1 else "have"
            yield f"{', '.join(selected)} {have} no effect: dim_from_weights takes layers and ranks from the file"
    if spec.kind == "oft":
        if options.network_alpha >= 1:
            yield f"network_alpha is {options.network_alpha:g}, which does not hold OFT back at all; 1e-3 is usual"
        if not options.network_train_unet_only:
            yield "networks.oft_flux trains FLUX only: the text encoders get nothing"


def _given_twice(options: Options) -> Iterator[str]:
    """The line about each setting in a list of them that has two values. As in the reference, the last one counts."""
    for name in ("network_args", "optimizer_args", "lr_scheduler_args"):
        values: dict[str, str] = {}
        pairs: tuple[str, ...] | None = getattr(options, name)
        for pair in pairs or ():
            key, _, value = (piece.strip() for piece in pair.partition("="))
            if values.get(key, value) != value:
                yield f"{key} of {name} is given twice: {values[key]} has no effect beside {value}, which comes later"
            values[key] = value


def _is_given(options: Options, key: str) -> bool:
    return any(pair.partition("=")[0].strip() == key for pair in options.network_args or ())


def _rates_without_effect(options: Options, rate: str, why: str) -> Iterator[str]:
    """The line about a component's rate and LoRA+ ratio when that component is not trained."""
    ratio = f"loraplus_{rate.removesuffix('_lr')}_lr_ratio"
    names = [rate] if getattr(options, rate) is not None else []
    names += [ratio] if _is_given(options, ratio) else []
    if names:
        have = "has" if len(names) == 1 else "have"
        yield f"{' and '.join(names)} {have} no effect: {why}"
