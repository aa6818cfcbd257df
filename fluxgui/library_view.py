"""The parts of the Library page as HTML. Everything that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Final, cast
from urllib.parse import quote

from fluxgui.jobs import JobView
from fluxgui.language import say
from fluxgui.library import Entry
from trainer.schema.model_kinds import format_bytes

MAX_CARDS: Final = 200
MAX_VALUE: Final = 400
CARDS_SCRIPT: Final = """
element.addEventListener("click", (event) => {
    const card = event.target.closest("button[data-lora]");
    if (card) trigger("click", {id: card.dataset.lora});
});
"""
_MODEL_SPEC: Final = "modelspec."


def cards(entries: Sequence[Entry], chosen: str | None, *, is_search: bool) -> str:
    if not entries:
        return f'<p class="empty">{escape(say("library.nothing_found") if is_search else say("library.empty"))}</p>'
    ids = {chosen}
    return (
        f'<div class="lora-grid">{"".join(_card(entry, entry.entry_id in ids) for entry in entries[:MAX_CARDS])}</div>'
    )


def _card(entry: Entry, is_chosen: bool) -> str:
    facts = entry.facts
    rank = "" if facts.rank is None else say("library.rank", rank=facts.rank)
    lines = [facts.base, " · ".join(part for part in (rank, format_bytes(entry.num_bytes)) if part), facts.trigger]
    lines.append(_date(entry))
    body = "".join(f"<span>{escape(line)}</span>" for line in lines if line)
    return (
        f'<button type="button" class="lora-card" data-lora="{entry.entry_id}" aria-pressed="{str(is_chosen).lower()}" '
        f'aria-label="{escape(say("library.card", name=entry.title))}">{_picture(entry)}'
        f"<strong>{escape(entry.title)}</strong>{body}</button>"
    )


def _picture(entry: Entry) -> str:
    if entry.preview is None:
        return f'<span class="no-picture">{escape(say("library.no_picture"))}</span>'
    alt = escape(say("library.preview_of", name=entry.title))
    stamp = quote(entry.preview.name)
    return f'<img loading="lazy" alt="{alt}" src="/library/preview/{entry.entry_id}?v={stamp}">'


def _date(entry: Entry) -> str:
    return f"{datetime.fromtimestamp(entry.modified):%Y-%m-%d %H:%M}"


def details(entry: Entry) -> str:
    """Picture, facts, download, and what the file says of its training."""
    facts = entry.facts
    unknown = say("library.not_said")
    rows = {
        "library.base": facts.base or unknown,
        "library.rank_label": unknown if facts.rank is None else str(facts.rank),
        "library.alpha_label": facts.alpha or unknown,
        "library.trigger": facts.trigger or unknown,
        "library.steps": facts.steps or unknown,
        "library.size": format_bytes(entry.num_bytes),
        "library.date": _date(entry),
        "library.file": entry.path.name,
    }
    if entry.run is not None:
        rows["library.from_run"] = entry.run.path.name
    listed = "".join(f"<div><dt>{escape(say(name))}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    picture = _picture(entry) if entry.preview is not None else ""
    return (
        f'<div class="lora-head">{picture}<div><h2>{escape(entry.title)}</h2><dl class="facts">{listed}</dl>'
        f'<a class="download" href="/library/file/{entry.entry_id}" download>{escape(say("library.download"))}</a>'
        f"</div></div>"
    )


def metadata_table(metadata: Mapping[str, str]) -> str:
    """The training's options first, then what the file says of itself."""
    names = sorted(metadata, key=lambda name: (name.startswith(_MODEL_SPEC), name))
    rows = "".join(
        f"<tr><td>{escape(name.removeprefix('ss_'))}</td><td>{escape(_short(metadata[name]))}</td></tr>"
        for name in names
        if metadata[name] not in ("", "None")
    )
    if not rows:
        return f'<p class="empty">{escape(say("library.no_metadata"))}</p>'
    return f'<div class="settings-table about" tabindex="0"><table>{rows}</table></div>'


def _short(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]} ..."


# ----------------------------------------------------------------------------------------------------------------- jobs


def progress(view: JobView | None) -> str:
    """How a job stands: a bar while it runs, the reason where it failed."""
    if view is None:
        return ""
    if view.is_live:
        part = 100 * view.done / view.total if view.total else 0
        moving = "" if view.total else " moving"
        words = view.text or say(f"library.job_{view.state}")
        return f'<p role="status">{escape(words)}</p><div class="bar running{moving}"><div style="width: {part:.1f}%"></div></div>'
    words = escape(say(f"library.job_{view.state}"))
    more = "".join(f"<p>{escape(line)}</p>" for line in view.error.splitlines())
    warnings = "".join(f"<p>{escape(line)}</p>" for line in view.warnings)
    kind = {"completed": "good", "cancelled": "warn"}.get(view.state, "bad")
    return f'<div class="box {kind}" role="status"><strong>{words}</strong>{more}{warnings}</div>'


def tool_result(view: JobView | None) -> str:
    if view is None:
        return ""
    text = "\n".join(str(result.get("text", "")) for result in view.results)
    return progress(view) + (f'<div class="tool-text" tabindex="0">{escape(text)}</div>' if text else "")


def try_grid(view: JobView | None) -> str:
    """For each prompt a table of checkpoints by strengths; a cell is empty until its picture is made."""
    if view is None:
        return ""
    made: dict[tuple[int, int, float], str] = {}
    for result in view.results:
        address = f"/library/picture/{quote(view.job_id, safe='')}/{quote(Path(str(result.get('path'))).name, safe='')}"
        for cell in cast("list[dict[str, object]]", result.get("cells") or []):
            made[_cell(cell)] = address
    strengths = [float(str(value)) for value in cast("list[object]", view.subject.get("strengths") or [])]
    names = [str(name) for name in cast("list[object]", view.subject.get("checkpoints") or [])]
    tables: list[str] = []
    for number, prompt in enumerate(cast("list[str]", view.subject.get("prompts") or [])):
        head = "".join(f'<th scope="col">{escape(_strength(value))}</th>' for value in strengths)
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(_grid_cell(made.get((number, index, value)), prompt, name, value) for value in strengths)
            + "</tr>"
            for index, name in enumerate(names)
        )
        caption = say("library.prompt_number", number=number + 1, prompt=prompt)
        tables.append(
            f"<table><caption>{escape(caption)}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )
    return f'<div class="try-grid" tabindex="0">{"".join(tables)}</div>'


def _cell(cell: Mapping[str, object]) -> tuple[int, int, float]:
    return int(str(cell["prompt"])), int(str(cell["checkpoint"] or 0)), float(str(cell["strength"]))


def _strength(value: float) -> str:
    return say("library.base_column") if value == 0 else f"{value:g}"


def _grid_cell(address: str | None, prompt: str, name: str, value: float) -> str:
    if address is None:
        return '<td><span class="waiting-cell"></span></td>'
    alt = say("library.picture_at", prompt=prompt, checkpoint=name, strength=f"{value:g}")
    return f'<td><a href="{address}" target="_blank"><img alt="{escape(alt)}" src="{address}"></a></td>'
