"""The memory plan for what the form says: gathers what `trainer.schema.memory_plan` needs. No gradio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fluxgui.form import Reading
from trainer.schema.base import UserError
from trainer.schema.calibration import calibration_for
from trainer.schema.chroma_header import read_transformer
from trainer.schema.memory import Estimate
from trainer.schema.memory_plan import Plan, plan_for
from trainer.schema.options_data import parse_resolution

DEFAULT_SIDE: Final = 512


@dataclass(frozen=True)
class MemoryPlan:
    """`plan` is for a card of `vram_bytes`; `estimate` that of its choice."""

    plan: Plan
    vram_bytes: int

    @property
    def estimate(self) -> Estimate:
        return self.plan.choice.estimate


def plan_memory(reading: Reading, *, vram_gb: float | None, ram_bytes: int | None = None) -> MemoryPlan | str:
    """The plan with the smallest `blocks_to_swap` that fits, or why there is none."""
    if vram_gb is None or vram_gb <= 0:
        return "Say how much memory the card has."
    options = reading.options
    if options is None:
        return "Correct the values that are marked first."
    if options.pretrained_model_name_or_path is None:
        return "Choose the FLUX.1 model first: its sizes are read from the file."
    vram_bytes = round(vram_gb * 2**30)
    try:
        plan = plan_for(
            options,
            vram_bytes,
            ram_bytes,
            flux=read_transformer(options.pretrained_model_name_or_path, options.model_type),
            size=parse_resolution(options.resolution or DEFAULT_SIDE),
            batch_size=options.train_batch_size,
            calibration=calibration_for(None, vram_bytes),
            num_pictures=None if reading.pictures is None else len(reading.pictures.images),
        )
    except UserError as error:
        return str(error)
    return MemoryPlan(plan, vram_bytes)
