"""The parts of a run's page as HTML. Pure: a state in, text out; everything that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Final

from fluxgui.language import say
from fluxgui.run_files_view import megabytes
from fluxgui.run_state import RunState
from fluxgui.runs import Contents
from trainer.schema.run_probe import RunStatus

MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

PHASES: Final = frozenset({"check", "waiting", "text", "latents", "model", "training", "sampling", "saving"})


def made_at(run_id: str) -> str:
    """Day and time from the beginning of a run's id; empty for a folder that was named otherwise."""
    try:
        moment = datetime.strptime(run_id[:15], "%Y%m%d-%H%M%S")  # the clock's own time, as in the folder's name
    except ValueError:
        return ""
    return f"{moment.day} {MONTHS[moment.month - 1]} {moment:%H:%M}"


def status_words(status: RunStatus, state: RunState) -> str:
    if status.state == "running" and state.phase == "waiting":
        return say("runs.state_waiting")
    return say(f"runs.state_{status.state}")


def phase_words(phase: str) -> str:
    """What a phase does; one that is not known by its own name."""
    if phase in PHASES:
        return say(f"runs.phase_{phase}")
    return phase or say("runs.phase_start")


def header(name: str, status: RunStatus, state: RunState) -> str:
    """Name, status, what it is doing, progress bar, and the figures of the moment."""
    words = status_words(status, state)
    return (
        f'<div class="run-head"><h2>{escape(name)}</h2>'
        f'<span class="chip {status.state}" role="status">{escape(words)}</span></div>'
        f'<p class="doing">{escape(_doing(status, state))}</p>{_progress(status, state)}{_facts(status, state)}'
    )


def _doing(status: RunStatus, state: RunState) -> str:
    phase = phase_words(state.phase)
    begun = phase[:1].upper() + phase[1:]
    match status.state:
        case "running" if state.phase in ("training", "sampling", "saving") and state.num_steps:
            text = say("runs.doing_steps", phase=begun, step=state.step, total=state.num_steps)
            if state.num_epochs:
                text += say("runs.doing_epoch", epoch=max(state.epoch, 1), total=state.num_epochs)
            return text
        case "running" if state.phase_total:
            return say("runs.doing_part", phase=begun, done=state.phase_done, total=state.phase_total)
        case "running":
            return begun
        case "queued":
            return say("runs.waits")
        case "starting":
            return say("runs.doing_start")
        case "paused":
            return say("runs.doing_paused", step=state.step, total=state.num_steps)
        case "completed":
            return say("runs.doing_completed", step=state.step)
        case "stopped" if state.num_seen == 0:
            return say("runs.never_started")
        case "stopped":
            return say("runs.doing_stopped", step=state.step, total=state.num_steps)
        case "failed":
            return say("runs.doing_failed", phase=phase)
        case "crashed":
            return say("runs.doing_crashed", phase=phase)
        case _:
            return status.detail


def _progress(status: RunStatus, state: RunState) -> str:
    if status.state == "completed":
        done, total = 1, 1
    elif state.num_steps and (state.step or state.phase in ("training", "sampling", "saving")):
        done, total = state.step, state.num_steps
    else:
        done, total = state.phase_done, state.phase_total
    percent = 100 * done / total if total else 0.0
    moving = " moving" if status.state in ("running", "starting") and not total else ""
    return (
        f'<div class="bar {status.state}{moving}" role="progressbar" aria-label="Progress" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent:.0f}"><div style="width:{percent:.1f}%"></div></div>'
    )


def _facts(status: RunStatus, state: RunState) -> str:
    facts: list[tuple[str, str]] = []
    if status.state == "running" and state.seconds_left is not None:
        facts.append((say("runs.time_left"), duration(state.seconds_left)))
    if state.loss is not None:
        facts.append((say("runs.loss_now"), f"{state.loss:.4f}"))
    if state.step_seconds:
        facts.append((say("runs.a_step"), f"{state.step_seconds:.2f} s"))
    if state.learning_rate:
        facts.append((say("runs.rate_now"), f"{state.learning_rate:.3g}"))
    if state.peak_bytes:
        facts.append((say("runs.vram_peak"), gib(state.peak_bytes)))
    if state.host_bytes:
        facts.append((say("runs.host_now"), gib(state.host_bytes)))
    if state.num_images:
        facts.append((say("runs.pictures"), str(state.num_images)))
    if state.device:
        facts.append((say("runs.device"), state.device))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def messages(status: RunStatus, state: RunState, log_tail: str, noticed: Sequence[str] = ()) -> str:
    """Errors with what to do, a crash with the log's end, and warnings; empty when all is well.

    `noticed` are warnings that the page has by itself.
    """
    parts: list[str] = []
    for error in state.errors if status.state in ("failed", "stuck", "crashed") else ():
        where = f'<p class="where">{escape(error.where)}</p>' if error.where else ""
        hint = f'<p class="hint">{escape(error.hint)}</p>' if error.hint else ""
        parts.append(f'<div class="box bad" role="alert"><strong>{escape(error.message)}</strong>{where}{hint}</div>')
    if status.state in ("crashed", "stuck") or (status.state == "failed" and not state.errors):
        title = {
            "crashed": say("runs.crashed_log"),
            "stuck": say("runs.stuck_log", detail=status.detail),
            "failed": say("runs.failed_log"),
        }[status.state]
        tail = "\n".join(log_tail.splitlines()[-15:]) or say("runs.log_empty")
        parts.append(
            f'<div class="box bad" role="alert"><strong>{escape(title)}</strong>'
            f'<div class="log-tail" tabindex="0"><pre>{escape(tail)}</pre></div></div>'
        )
    warnings = [*noticed, *state.warnings[-8:]]
    if warnings:
        items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
        parts.append(f'<div class="box warn"><strong>{escape(say("runs.warnings"))}</strong><ul>{items}</ul></div>')
    return "".join(parts)


def waiting(
    pending: Sequence[str],
    *,
    is_live: bool,
    is_queued: bool = False,
    can_resume: bool = False,
    state_step: int | None = None,
) -> str:
    """What was asked for and not yet taken up, else what the buttons do. `state_step` is where the run would go on."""
    if pending:
        asked = say("runs.asked_for", names=", ".join(pending))
        return f'<p class="empty" role="status">{escape(asked)}</p>'
    if is_queued:
        return f'<p class="empty">{escape(say("runs.queue_explained"))}</p>'
    if not is_live:
        words = say("runs.what_again_does")
        if can_resume:
            place = say("runs.resume_anew") if state_step is None else say("runs.resume_after", step=state_step)
            words = f"{place} {words}"
        return f'<p class="empty">{escape(words)}</p>'
    return f'<p class="empty">{escape(say("runs.what_buttons_do"))}</p>'


def deletion(name: str, found: Contents, bin_folder: str) -> str:
    """The question before a run is deleted, which names what is lost."""
    parts = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((found.num_checkpoints, "saved LoRA"), (found.num_samples, "sample"))
        if count
    ]
    parts.append("its log and its settings")
    if found.has_state:
        parts.append("the state to resume from")
    return (
        f"Delete {name}? {', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]} "
        f"({megabytes(found.num_bytes)}) leave this list. They go to the bin, {bin_folder}, and stay there until you "
        "empty it."
    )


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
