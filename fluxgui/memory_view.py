"""The memory plan as HTML: what fills the card and the main memory, what it costs in time, and what is impossible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

from fluxgui.language import say
from trainer.schema.memory_phases import gib_text
from trainer.schema.memory_plan import Choice, Plan, Segment

# Colours that people who confuse red and green tell apart (Okabe and Ito, "Color Universal Design", 2008).
COLOURS: Final[Mapping[str, str]] = {
    "weights": "#0072b2",
    "lora": "#d55e00",
    "optimizer": "#cc79a7",
    "gradients": "#e69f00",
    "activations": "#009e73",
    "workspace": "#56b4e9",
}
NUM_ALTERNATIVES: Final = 4
MUCH_LONGER: Final = 1.02
"""Step times within this ratio are called equal."""


def cannot_estimate(reason: str) -> str:
    return f'<div class="box warn" role="status">{escape(reason)}</div>'


def is_old() -> str:
    return f'<div class="box warn" role="status">{escape(say("train.estimate_is_old"))}</div>'


def plan_html(plan: Plan, *, num_steps: int | None, accumulation: int) -> str:
    """Verdict, the two bars with their legends, the time, and what cannot be done.

    `num_steps` are optimizer steps of `accumulation` micro-steps each, None while they are not known.
    """
    choice = plan.choice
    assert plan.vram_bytes is not None
    found = choice.estimate
    parts = [_verdict(plan)]
    title = say("train.bar_device", phase=say(f"train.phase_{choice.peak_phase.name.replace(' ', '_')}"))
    parts.append(_bar(title, choice.device_bar, plan.vram_bytes, plan.usable_vram_bytes))
    if plan.ram_bytes is not None:
        parts.append(_bar(say("train.bar_host"), choice.host_bar, plan.ram_bytes, plan.usable_ram_bytes))
    if found.text_on_host:
        parts.append(f'<p class="empty">{escape(say("train.text_on_host"))}</p>')
    if plan.fits:
        parts.append(f"<p>{escape(time_text(plan, num_steps=num_steps, accumulation=accumulation))}</p>")
    parts.append(_details(plan))
    return f'<div class="memory">{"".join(parts)}</div>'


def _verdict(plan: Plan) -> str:
    choice, found = plan.choice, plan.choice.estimate
    assert plan.vram_bytes is not None
    words = say(
        "train.fits" if plan.fits else "train.fits_not",
        blocks=choice.blocks_to_swap,
        peak=gib_text(found.peak_bytes),
        card=gib_text(plan.vram_bytes),
        usable=gib_text(plan.usable_vram_bytes or 0),
    )
    if plan.fits:
        return (
            f'<div class="box good" role="status"><strong>{escape(words)}</strong><p>{escape(_cost(choice))}</p></div>'
        )
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in plan.impossible)
    rest = say("train.fits_otherwise" if plan.alternatives else "train.fits_nothing")
    return f'<div class="box bad" role="status"><strong>{escape(words)}</strong>{reasons}<p>{escape(rest)}</p></div>'


def _cost(choice: Choice) -> str:
    """What the swapped blocks cost in time."""
    if not choice.blocks_to_swap:
        return say("train.no_swap")
    if choice.step_time_ratio < MUCH_LONGER:
        return say("train.swap_is_hidden", blocks=choice.blocks_to_swap)
    percent = round(100 * (choice.step_time_ratio - 1))
    return say("train.swap_costs", blocks=choice.blocks_to_swap, percent=percent)


def time_text(plan: Plan, *, num_steps: int | None, accumulation: int) -> str:
    """The expected time in words, with what it rests on."""
    seconds = plan.choice.step_seconds * accumulation
    step = say("train.seconds", number=f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}")
    rates = say("train.time_is_rough", rates=plan.rates.name)
    if num_steps is None:
        return f"{say('train.time_of_step', step=step)} {rates}"
    whole = say("train.time_of_run", steps=num_steps, step=step, time=duration(seconds * num_steps))
    return f"{whole} {rates}"


def duration(seconds: float) -> str:
    """A time as people say it: minutes under two hours."""
    if seconds < 60:
        return say("train.under_a_minute")
    if seconds < 2 * 3600:
        return say("train.minutes", number=round(seconds / 60))
    return say("train.hours", number=f"{seconds / 3600:.1f}")


def alternative_text(choice: Choice, labels: Mapping[str, str]) -> str:
    """One other way to train, as a choice on the page."""
    changes = [_change(labels.get(name, name), value) for name, value in choice.changes.items()]
    return say(
        "train.alternative",
        changes=", ".join(changes),
        peak=gib_text(choice.estimate.peak_bytes),
        host=gib_text(choice.estimate.host_peak_bytes),
        seconds=f"{choice.step_seconds:.2g}",
    )


def _change(label: str, value: object) -> str:
    if isinstance(value, bool):
        shown = say("options.on" if value else "options.off")
    else:
        shown = say("train.as_computed") if value is None else str(value)
    return f"{label}: {shown}"


def _bar(title: str, segments: Sequence[Segment], total_bytes: int, usable_bytes: int | None) -> str:
    """One stacked bar with its legend. A line marks the whole memory where more would be needed."""
    used = sum(segment.bytes for segment in segments)
    scale = max(used, total_bytes)
    rows: list[tuple[str, str, int]] = [
        (COLOURS[segment.kind], say(f"train.kind_{segment.kind}"), segment.bytes) for segment in segments
    ]
    pieces = "".join(
        f'<div style="width:{100 * num_bytes / scale:.2f}%;background:{colour}" title="{_amount(name, num_bytes)}"></div>'
        for colour, name, num_bytes in rows
    )
    too_much = used - (usable_bytes if usable_bytes is not None else total_bytes)
    rest = say("train.too_much", size=gib_text(too_much)) if too_much > 0 else say("train.free")
    limit = ""
    if used > total_bytes:
        limit = f'<span class="limit" style="left:{100 * total_bytes / scale:.2f}%"></span>'
    spoken = "; ".join([title, *(_amount(name, num_bytes) for _, name, num_bytes in rows)])
    legend = "".join(_legend(colour, name, num_bytes) for colour, name, num_bytes in rows)
    if too_much > 0:
        legend += f'<li class="over">{escape(rest)}</li>'
    else:
        legend += _legend("transparent", rest, total_bytes - used)
    total = say("train.of_total", used=gib_text(used), total=gib_text(total_bytes))
    return (
        f'<div class="memory-title"><span>{escape(title)}</span><span>{escape(total)}</span></div>'
        f'<div class="memory-bar" role="img" aria-label="{escape(spoken, quote=True)}">{pieces}{limit}</div>'
        f'<ul class="memory-legend">{legend}</ul>'
    )


def _legend(colour: str, name: str, num_bytes: int) -> str:
    return f'<li><span class="swatch" style="background:{colour}"></span>{_amount(name, num_bytes)}</li>'


def _amount(name: str, num_bytes: int) -> str:
    return escape(f"{name} {gib_text(num_bytes)}", quote=True)


def _details(plan: Plan) -> str:
    """Everything that the bars sum up, and what was assumed."""
    found = plan.choice.estimate
    phases = _table((say(f"train.phase_{phase.name.replace(' ', '_')}"), phase.peak_bytes) for phase in found.phases)
    device = _table((part.name, part.bytes) for part in plan.choice.peak_phase.parts if part.bytes)
    host = _table((part.name, part.bytes) for part in found.host_parts if part.bytes)
    assumed = "".join(f"<li>{escape(line)}</li>" for line in plan.assumptions)
    return (
        f"<details><summary>{escape(say('train.details'))}</summary>"
        f"<h4>{escape(say('train.peak_of_phases'))}</h4>{phases}"
        f"<h4>{escape(say('train.parts_of_peak'))}</h4>{device}"
        f"<h4>{escape(say('train.bar_host'))}</h4>{host}"
        f"<h4>{escape(say('train.assumed'))}</h4><ul><li>{escape(say('train.not_measured'))}</li>{assumed}</ul></details>"
    )


def _table(rows: Iterable[tuple[str, int]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{gib_text(num_bytes)}</td></tr>" for name, num_bytes in rows)
    return f"<table><tbody>{cells}</tbody></table>"
