"""The queue and the list of runs as HTML. Pure: views in, text out; everything that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fluxgui.language import say
from fluxgui.run_files_view import thumb_url
from fluxgui.run_view import made_at, status_words
from fluxgui.runs import RunView

MAX_LISTED = 200


def queue(waiting: Sequence[RunView], at_work: Sequence[RunView]) -> str:
    """What waits, in order, each with buttons to move it and to take it out; empty when nothing waits."""
    if not waiting:
        return ""
    last = len(waiting) - 1
    items = "".join(
        f'<li><span class="queued-name">{escape(view.name)}</span>'
        + _button(view, "up", "↑", say("runs.move_up", name=view.name), usable=place > 0)
        + _button(view, "down", "↓", say("runs.move_down", name=view.name), usable=place < last)
        + _button(view, "cancel", say("runs.cancel"), say("runs.cancel_name", name=view.name))
        + "</li>"
        for place, view in enumerate(waiting)
    )
    before = say("runs.queue_behind", names=", ".join(view.name for view in at_work)) if at_work else ""
    return (
        f"<h2>{escape(say('runs.queue'))}</h2><p>{escape(before)} {escape(say('runs.queue_explained'))}</p>"
        f"<ol>{items}</ol>"
    )


def _button(view: RunView, action: str, text: str, label: str, *, usable: bool = True) -> str:
    return (
        f'<button type="button" data-action="{action}" data-run="{escape(view.run_id)}" aria-label="{escape(label)}" '
        f'title="{escape(label)}"{"" if usable else " disabled"}>{escape(text)}</button>'
    )


def cards(views: Sequence[RunView], chosen: str | None, *, search: str = "") -> str:
    """The runs, each a button: newest sample, name, status, progress, loss, start, device, notes."""
    found = [view for view in views if matches(view, search)]
    if not found:
        return f'<p class="empty">{escape(say("runs.none_found"))}</p>' if views else ""
    shown = found[:MAX_LISTED]
    more = (
        f'<p class="empty">{escape(say("runs.more", count=len(found) - len(shown)))}</p>' if found[len(shown) :] else ""
    )
    return f'<div class="run-cards">{"".join(_card(view, chosen) for view in shown)}</div>{more}'


def matches(view: RunView, search: str) -> bool:
    """Whether every word that is searched for occurs in the run's name, id, status or notes."""
    told = f"{view.name} {view.run_id} {status_words(view.status, view.state)} {view.notes}".casefold()
    return all(word in told for word in search.casefold().split())


def _card(view: RunView, chosen: str | None) -> str:
    state, status = view.state, view.status
    newest = max(state.samples, key=lambda sample: (sample.step, -sample.index), default=None)
    picture = (
        f'<img alt="" loading="lazy" src="{thumb_url(view.run_id, newest.path)}">'
        if newest is not None
        else '<span class="no-picture"></span>'
    )
    percent = 100 if status.state == "completed" else 100 * state.step // state.num_steps if state.num_steps else 0
    words = status_words(status, state)
    if state.num_steps and status.state != "completed" and state.step:
        words += f" {percent} %"
    facts = [made_at(view.run_id), state.device, f"loss {state.loss:.3f}" if state.loss is not None else ""]
    notes = f'<span class="card-notes">{escape(view.notes[:120])}</span>' if view.notes else ""
    here = ' aria-current="true"' if view.run_id == chosen else ""
    return (
        f'<button type="button" class="run-card" data-action="show" data-run="{escape(view.run_id)}"{here}>{picture}'
        f'<span class="card-text"><strong>{escape(view.name)}</strong>'
        f'<span class="card-status {status.state}">{escape(words)}</span>'
        f'<span class="card-bar {status.state}"><span style="width:{percent}%"></span></span>'
        f'<span class="card-facts">{escape(" · ".join(fact for fact in facts if fact))}</span>{notes}</span></button>'
    )
