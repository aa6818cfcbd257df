"""The VRAM estimate for what the form says: gathers what `trainer.schema.memory` needs. No gradio."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Final

from fluxgui.form import Reading
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import (
    autoencoder_params,
    clip_params,
    t5_params,
)
from trainer.schema.chroma_header import TransformerParams, read_transformer
from trainer.schema.memory import Estimate, pick_blocks_to_swap
from trainer.schema.options import Options
from trainer.schema.options_data import parse_resolution
from trainer.schema.parameter_counts import OtherModels, usual_models
from trainer.schema.weight_files import read_weights

DEFAULT_SIDE: Final = 512


@dataclass(frozen=True)
class MemoryPlan:
    estimate: Estimate
    vram_bytes: int


def plan_memory(reading: Reading, *, vram_gb: float | None) -> MemoryPlan | str:
    """The estimate with the smallest `blocks_to_swap` that fits, or why there is none."""
    if vram_gb is None or vram_gb <= 0:
        return "Say how much memory the card has."
    options = reading.options
    if options is None:
        return "Correct the values that are marked first."
    if options.pretrained_model_name_or_path is None:
        return "Choose the FLUX.1 model first: its sizes are read from the file."
    try:
        params = read_transformer(options.pretrained_model_name_or_path, options.model_type)
    except UserError as error:
        return str(error)
    width, height = parse_resolution(options.resolution or DEFAULT_SIDE)
    vram_bytes = round(vram_gb * 2**30)
    try:
        plan = pick_blocks_to_swap(
            params,
            options,
            width=width,
            height=height,
            batch_size=options.train_batch_size,
            vram_bytes=vram_bytes,
            models=_other_models(params, options),
        )
    except UserError as error:
        return str(error)
    return MemoryPlan(plan, vram_bytes)


def _other_models(flux: TransformerParams, options: Options) -> OtherModels:
    """The sizes of the chosen encoders, and the usual ones for those not chosen yet or not readable."""
    models = usual_models(flux)
    with contextlib.suppress(UserError):
        if options.t5xxl is not None:
            models = replace(models, t5=t5_params(read_weights(options.t5xxl, "t5xxl")))
    with contextlib.suppress(UserError):
        if options.clip_l is not None:
            models = replace(models, clip=clip_params(read_weights(options.clip_l, "clip_l")))
    with contextlib.suppress(UserError):
        if options.ae is not None:
            models = replace(models, autoencoder=autoencoder_params(read_weights(options.ae, "autoencoder")))
    return models
