"""`python -m trainer estimate`: what memory a training needs, and what fits a card and a machine.

Reads headers of model files at most, and no torch: it answers in a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Final

from trainer.schema.base import UserError, shown
from trainer.schema.calibration import calibration_for, read_calibrations
from trainer.schema.cli import parse_command_line
from trainer.schema.memory import Estimate
from trainer.schema.memory_phases import GIB, KINDS, Part, gib_text
from trainer.schema.memory_plan import Choice, Plan, plan_for

_NAMES: Final = {
    "weights": "frozen weights",
    "lora": "LoRA",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "workspace": "workspace",
}


def estimate_text(arguments: Sequence[str]) -> str:
    """The answer to the command's arguments. Raises `UserError` for wrong options and unreadable files."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer estimate",
        description="Says what memory the training with the options that follow needs.",
        allow_abbrev=False,
    )
    parser.add_argument("--vram_gb", type=float, help="memory of the card in GiB: plans for it")
    parser.add_argument("--ram_gb", type=float, help="main memory of the machine in GiB: plans for it")
    parser.add_argument(
        "--gpu", help="name of a device that a run has measured; without it the one of the size of --vram_gb"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    known, rest = parser.parse_known_args(arguments)
    options = parse_command_line(rest).options
    vram_bytes, ram_bytes = _size("vram_gb", known.vram_gb), _size("ram_gb", known.ram_gb)
    calibration = calibration_for(known.gpu, vram_bytes)
    if known.gpu is not None and calibration is None:
        names = ", ".join(read_calibrations()) or "none yet"
        raise UserError(f"nothing was measured on {known.gpu}", "--gpu", f"Measured are: {names}.", exit_code=2)
    plan = plan_for(options, vram_bytes, ram_bytes, calibration=calibration)
    is_planned = vram_bytes is not None or ram_bytes is not None
    # A number that was given is what the figures are for; the plan may say another.
    result = plan.choice.estimate
    if is_planned and isinstance(options.blocks_to_swap, int):
        result = plan_for(options, calibration=calibration).choice.estimate
    if known.json:
        return json.dumps(_as_json(result, plan, is_planned=is_planned), indent=1)
    return "\n".join(_lines(result, plan, is_planned=is_planned))


def _size(name: str, gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 < gib < 1e6:
        raise UserError(f"{name} is {gib:g}; it must be above 0", f"--{name}", "In GiB, such as 12.", exit_code=2)
    return round(gib * GIB)


def _as_json(result: Estimate, plan: Plan, *, is_planned: bool) -> dict[str, object]:
    answer: dict[str, object] = {
        "peak_bytes": result.peak_bytes,
        "host_peak_bytes": result.host_peak_bytes,
        "blocks_to_swap": result.blocks_to_swap,
        "width": plan.width,
        "height": plan.height,
        "batch_size": plan.batch_size,
        "text_on_host": result.text_on_host,
        "text_streamed": result.text_streamed,
        "phases": [
            {
                "name": phase.name,
                "peak_bytes": phase.peak_bytes,
                **phase.split(),
                "parts": [_part(part) for part in phase.parts],
            }
            for phase in result.phases
        ],
        "host_parts": [_part(part) for part in result.host_parts],
        "assumptions": list(plan.assumptions),
    }
    if is_planned:
        answer["plan"] = {
            "fits": plan.fits,
            "vram_bytes": plan.vram_bytes,
            "usable_vram_bytes": plan.usable_vram_bytes,
            "ram_bytes": plan.ram_bytes,
            "usable_ram_bytes": plan.usable_ram_bytes,
            **_choice(plan.choice),
            "alternatives": [_choice(other) for other in plan.alternatives],
            "impossible": list(plan.impossible),
        }
    return answer


def _part(part: Part) -> dict[str, object]:
    return {"name": part.name, "kind": part.kind, "bytes": part.bytes}


def _choice(choice: Choice) -> dict[str, object]:
    return {
        "blocks_to_swap": choice.blocks_to_swap,
        "changes": dict(choice.changes),
        "peak_bytes": choice.estimate.peak_bytes,
        "host_peak_bytes": choice.estimate.host_peak_bytes,
        "step_seconds": round(choice.step_seconds, 4),
        "step_time_ratio": round(choice.step_time_ratio, 4),
    }


def _lines(result: Estimate, plan: Plan, *, is_planned: bool) -> Iterator[str]:
    yield f"{plan.width} x {plan.height}, batch {plan.batch_size}, blocks_to_swap {result.blocks_to_swap}:"
    yield f"  {gib_text(result.peak_bytes)} on the device, {gib_text(result.host_peak_bytes)} of main memory"
    for phase in result.phases:
        yield f"\n{phase.name}: {gib_text(phase.peak_bytes)}"
        split = phase.split()
        for kind in KINDS:
            if split[kind]:
                yield f"  {_NAMES[kind]:<18}{gib_text(split[kind]):>10}   {_names(phase.parts, kind)}"
    if result.text_on_host:
        yield "  (the text encoders are too large for the card and run on the CPU)"
    if result.text_streamed:
        yield "  (the text encoders are too large for the card: T5's layers come to it in turn)"
    yield f"\nmain memory: {gib_text(result.host_peak_bytes)}"
    for part in result.host_parts:
        yield f"  {gib_text(part.bytes):>10}   {part.name}"
    if is_planned:
        yield ""
        yield from _plan_lines(plan)
    yield "\nassumed:"
    for line in plan.assumptions:
        yield f"  - {line}"


def _names(parts: Sequence[Part], kind: str) -> str:
    return ", ".join(part.name for part in parts if part.kind == kind and part.bytes)


def _plan_lines(plan: Plan) -> Iterator[str]:
    limits = [
        f"{gib_text(size)} {what}, of which {gib_text(usable)} may be used"
        for size, usable, what in (
            (plan.vram_bytes, plan.usable_vram_bytes, "on the card"),
            (plan.ram_bytes, plan.usable_ram_bytes, "of main memory"),
        )
        if size is not None and usable is not None
    ]
    yield f"plan for {'; '.join(limits)}:"
    if plan.fits:
        yield f"  fits with {_choice_line(plan.choice)}"
    for reason in plan.impossible:
        yield f"  does not fit. {reason}"
    if plan.alternatives:
        yield "  also possible, the fastest first:" if plan.fits else "  what would fit, the fastest first:"
        for other in plan.alternatives:
            yield f"    {_choice_line(other)}"


def _choice_line(choice: Choice) -> str:
    settings = " ".join(_setting(name, value) for name, value in choice.changes.items())
    return (
        f"{settings}: {gib_text(choice.estimate.peak_bytes)} + {gib_text(choice.estimate.host_peak_bytes)} of main "
        f"memory, {choice.step_time_ratio:.2f} times the step time of these options without swap"
    )


def _setting(name: str, value: object) -> str:
    """As it is typed: a switch takes no value, and what is not to be given is named."""
    if value is None or value is False:
        return f"(without --{name})"
    return f"--{name}" if value is True else f"--{name}={shown(value)}"
