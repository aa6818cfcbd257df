"""All options together: the model `Options`, and the status of every option of the reference trainer and of ours."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Union, cast

from trainer.schema.base import Opt, Problem, UserError
from trainer.schema.memory import max_blocks_to_swap
from trainer.schema.network_args import read_network_args, read_optimizer_args
from trainer.schema.option_table import NOT_SUPPORTED, OPEN_TEXT, REFUSED_VALUES, OptionStatus, ValueType
from trainer.schema.options_data import CacheOptions, DatasetOptions
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
