"""A run's samples, downloads and log as HTML. Pure; everything that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import PurePath
from typing import Final
from urllib.parse import quote

from fluxgui.language import say
from fluxgui.run_state import Checkpoint, Sample

STEPS_SHOWN: Final = 12
"""Sample rows on the page; older ones are one click away."""
LOG_SHOWN: Final = 6_000
"""Characters of the log that are shown."""


def file_url(run_id: str, kind: str, path: str) -> str:
    """Address of a run's file, relative to the page; `server.py` answers it."""
    return f"files/{quote(run_id, safe='')}/{kind}/{quote(PurePath(path).name, safe='')}"


def thumb_url(run_id: str, path: str) -> str:
    """Address of a sample made small."""
    return file_url(run_id, "thumbs", path)


def samples(run_id: str, shown: Sequence[Sample]) -> str:
    """A grid, newest step first, one column per prompt. A click shows a sample large beside an earlier one."""
    if not shown:
        return f'<p class="empty">{escape(say("runs.no_samples"))}</p>'
    ordered = sorted(shown, key=lambda sample: (-sample.step, sample.index))
    rows = [sample_row(run_id, step, list(row)) for step, row in groupby(ordered, key=lambda sample: sample.step)]
    older = "".join(rows[STEPS_SHOWN:])
    more = (
        f"<details><summary>{escape(say('runs.earlier', count=len(rows) - STEPS_SHOWN))}</summary>{older}</details>"
        if older
        else ""
    )
    words = "".join(
        f' data-{name}="{escape(say(f"runs.{key}"))}"'
        for name, key in (("before", "before"), ("close", "close"), ("slider", "slider"), ("step", "step"))
    )
    return f'<div class="samples"{words}>{"".join(rows[:STEPS_SHOWN])}{more}</div>'


def sample_row(run_id: str, step: int, row: Sequence[Sample]) -> str:
    pictures = "".join(
        f'<a href="{file_url(run_id, "samples", sample.path)}" target="_blank" rel="noopener" data-large '
        f'data-step="{sample.step}" data-index="{sample.index}" title="{escape(sample.prompt)}">'
        f'<img loading="lazy" src="{thumb_url(run_id, sample.path)}" '
        f'alt="Sample of step {sample.step}: {escape(sample.prompt)}"><span>{escape(sample.prompt)}</span></a>'
        for sample in row
    )
    title = say("runs.at_step", step=step) if step else say("runs.before_training")
    return f'<section><h4>{escape(title)}</h4><div class="row">{pictures}</div></section>'


def checkpoints(run_id: str, shown: Sequence[Checkpoint]) -> str:
    """Download links, newest first, and those for everything in one file and for the report."""
    items = "".join(
        f'<li><a class="download" download href="{file_url(run_id, "checkpoints", c.path)}">'
        f"{escape(PurePath(c.path).name)}</a><span>step {c.step}, epoch {c.epoch}, {megabytes(c.num_bytes)}"
        f"{' <b>final</b>' if c.is_final else ''}</span></li>"
        for c in sorted(shown, key=lambda c: (c.is_final, c.step), reverse=True)
    )
    saved = f'<ul class="checkpoints">{items}</ul>' if items else f'<p class="empty">{escape(say("runs.no_files"))}</p>'
    return (
        f'{saved}<p class="all-files"><a download href="{file_url(run_id, "all", f"{run_id}.zip")}">'
        f'{escape(say("runs.zip"))}</a> <a download href="{file_url(run_id, "report", f"{run_id}.html")}">'
        f"{escape(say('runs.report'))}</a></p>"
    )


def log(run_id: str, tail: str, *, only_problems: bool = False) -> str:
    """The end of the worker's log, with a link to all of it."""
    if not tail:
        return f'<p class="empty">{escape(say("runs.log_empty"))}</p>'
    lines = problem_lines(tail) if only_problems else tail.splitlines()
    text = "\n".join(lines)
    if len(text) > LOG_SHOWN:
        text = text[-LOG_SHOWN:].partition("\n")[2]
    text = text or say("runs.log_no_problems")
    return (
        f'<div class="log-tail" tabindex="0" role="region" aria-label="End of the log"><pre>{escape(text)}</pre></div>'
        f'<p><a href="{file_url(run_id, "log", "worker.log")}" target="_blank" rel="noopener">'
        f"{escape(say('runs.whole_log'))}</a></p>"
    )


def problem_lines(tail: str) -> list[str]:
    """Warnings and errors, with the lines that belong to them: those without a time and level of their own."""
    kept: list[str] = []
    keeps = False
    for line in tail.splitlines():
        level = next((word for word in line.split()[2:3] if word.isupper()), None)
        if level is not None or line.startswith("Traceback"):
            keeps = level in ("WARNING", "ERROR", "CRITICAL") or level is None
        elif "warning" in line.casefold() or "error" in line.casefold():
            keeps = True
        if keeps:
            kept.append(line)
    return kept


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:.1f} kB"
