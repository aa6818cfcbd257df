"""`--blocks_to_swap=auto`: the number of swapped blocks, from what the device has free when the run starts."""

from __future__ import annotations

import dataclasses

import psutil

from trainer.schema.calibration import calibration_for
from trainer.schema.memory_phases import CUDA_CONTEXT_BYTES, gib_text
from trainer.schema.memory_plan import Plan, plan_for
from trainer.train.check import CheckedRun
from trainer.train.engine import Engine
from trainer.train.plan import largest_batch
from trainer.train.reporting import Reporter


def plan_of_run(
    checked: CheckedRun, vram_bytes: int | None, ram_bytes: int | None = None, device: str | None = None
) -> Plan:
    """What fits for the run's largest batch, with what was measured on `device` before; see `plan_for`."""
    size, batch_size = largest_batch(checked)
    return plan_for(
        checked.options,
        vram_bytes,
        ram_bytes,
        flux=checked.flux,
        models=checked.models,
        size=size,
        batch_size=batch_size,
        num_pictures=checked.index.num_images,
        calibration=calibration_for(device, None),
    )


def with_swap(checked: CheckedRun, blocks_to_swap: int) -> CheckedRun:
    """The run with this number of swapped blocks."""
    options = checked.options.model_copy(update={"blocks_to_swap": blocks_to_swap})
    return dataclasses.replace(checked, options=options)


def resolve_auto_swap(checked: CheckedRun, engine: Engine, reporter: Reporter) -> CheckedRun:
    """The run with a number for `auto`, the same on every process; a run that has one is left as it is."""
    if checked.options.blocks_to_swap != "auto":
        return checked
    free_bytes, total_bytes = engine.free_bytes(), engine.total_bytes()
    if free_bytes is None or total_bytes is None:
        reporter.note(
            f"blocks_to_swap auto is 0: {engine.device.type} computes in main memory, where nothing is swapped"
        )
        return with_swap(checked, 0)
    # The CUDA context is not free any more by now, and part of the estimate.
    plan = plan_of_run(
        checked, min(total_bytes, free_bytes + CUDA_CONTEXT_BYTES), psutil.virtual_memory().total, engine.name()
    )
    count = engine.share(plan.choice.blocks_to_swap)
    reporter.note(
        f"blocks_to_swap auto is {count}: about {gib_text(plan.choice.estimate.peak_bytes)} of "
        f"{gib_text(free_bytes)} that are free on the device"
    )
    for reason in plan.impossible:
        reporter.warning(reason)
    return with_swap(checked, count)
