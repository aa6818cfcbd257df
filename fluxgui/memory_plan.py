"""The memory plan for what the form says: gathers what `trainer.schema.memory_plan` needs. No gradio."""

from __future__ import annotations

from typing import Final

from fluxgui.form import Reading
from fluxgui.language import say
from trainer.schema.base import UserError
from trainer.schema.calibration import calibration_for
from trainer.schema.memory_plan import Plan, plan_for
from trainer.schema.options_data import parse_resolution

DEFAULT_SIDE: Final = 512


def plan_memory(reading: Reading, *, vram_gb: float | None, ram_gb: float | None = None) -> Plan | str:
    """The plan with the smallest `blocks_to_swap` that fits, or why there is none.

    Without a model file the published model's sizes are assumed. `ram_gb` None sets no limit to main memory.
    """
    if vram_gb is None or vram_gb <= 0:
        return say("train.no_vram")
    options = reading.options
    if options is None:
        return say("train.correct_first")
    vram_bytes = round(vram_gb * 2**30)
    try:
        return plan_for(
            options,
            vram_bytes,
            round(ram_gb * 2**30) if ram_gb else None,
            size=parse_resolution(options.resolution or DEFAULT_SIDE),
            batch_size=options.train_batch_size,
            calibration=calibration_for(None, vram_bytes),
            num_pictures=None if reading.pictures is None else len(reading.pictures.images),
        )
    except UserError as error:
        return str(error)
