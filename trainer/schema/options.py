"""All options that are carried out, together: the model `Options` and its groups."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from trainer.schema.options_data import CacheOptions, DatasetOptions
from trainer.schema.options_hub import HubOptions
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
from trainer.schema.options_validation import ValidationOptions


class Options(
    ModelOptions,
    MemoryOptions,
    NetworkOptions,
    DatasetOptions,
    CacheOptions,
    ValidationOptions,
    CourseOptions,
    OptimizerOptions,
    FlowOptions,
    SavingOptions,
    HubOptions,
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
        "validation": ValidationOptions,
        "saving": SavingOptions,
        "hub": HubOptions,
        "samples": SampleOptions,
        "logs": LogOptions,
        "metadata": MetadataOptions,
    }
)
"""Section name -> group, in the order in which options are shown and written."""

SECRET_OPTIONS: Final = frozenset({"huggingface_token", "wandb_api_key"})
"""Options that are never written into a file, a log or metadata."""

OUR_OPTIONS: Final = frozenset(
    {
        "base_storage",
        "base_storage_cache",
        "caption_variants",
        "checkpoint_blocks",
        "clip_l_tokenizer",
        "t5xxl_tokenizer",
        "clip_l_activation",
        "device",
        "lora_form",
        "masked_loss_normalize",
        "no_oom_recovery",
        "offload_modulation",
        "round_timesteps",
        "run_dir",
        "write_reference_caches",
    }
)
"""Options that the reference trainer does not have."""
