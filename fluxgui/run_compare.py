"""Runs beside each other: their losses in one chart, the options in which they differ, their samples. No gradio."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from fluxgui.language import say
from fluxgui.loss_plot import overlay
from fluxgui.run_files_view import file_url, thumb_url
from fluxgui.run_state import Sample
from fluxgui.runs import RunView

MAX_COMPARED: Final = 6
NOT_COMPARED: Final = frozenset({"output_name", "output_dir", "logging_dir", "dataset_config", "sample_prompts"})
"""Differ between any two runs and say nothing."""


def comparison(views: Sequence[RunView], *, smoothing: float) -> str:
    """Everything about two or more runs beside each other, as HTML."""
    views = views[:MAX_COMPARED]
    names = labels(views)
    chart = overlay([(name, view.state.points) for name, view in zip(names, views, strict=True)], smoothing=smoothing)
    return f"<h3>{escape(say('runs.loss'))}</h3>{chart}{_table(names, views)}{_samples(names, views)}"


def labels(views: Sequence[RunView]) -> list[str]:
    """A name for each; runs of one name are told apart by their id."""
    names = [view.name for view in views]
    return [view.name if names.count(view.name) == 1 else f"{view.name} ({view.run_id})" for view in views]


def differences(views: Sequence[RunView]) -> dict[str, list[str]]:
    """The options, and the keys of the dataset, that are not the same in all: a text for each run, "" where unset."""
    read = [_options(view) for view in views]
    rows: dict[str, list[str]] = {}
    for name in sorted({name for values in read for name in values} - NOT_COMPARED):
        shown = [values.get(name, "") for values in read]
        if len(set(shown)) > 1:
            rows[name] = shown
    return rows


def _options(view: RunView) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, prefix in ((view.run.config_toml, ""), (view.run.dataset_toml, "dataset: ")):
        try:
            values = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
        except (OSError, ValueError, TOMLKitError):
            continue
        _flatten(cast("dict[str, object]", values), prefix, found, keeps_sections=bool(prefix))
    return found


def _flatten(values: dict[str, object], prefix: str, found: dict[str, str], *, keeps_sections: bool) -> None:
    """One line for each key. The sections of a project's options mean nothing, those of a dataset do."""
    for key, value in values.items():
        if isinstance(value, dict):
            inner = f"{prefix}{key}." if keeps_sections else prefix
            _flatten(cast("dict[str, object]", value), inner, found, keeps_sections=keeps_sections)
        elif isinstance(value, list) and value and all(isinstance(each, dict) for each in cast("list[object]", value)):
            for number, each in enumerate(cast("list[dict[str, object]]", value), 1):
                _flatten(each, f"{prefix}{key} {number}.", found, keeps_sections=True)
        else:
            found[f"{prefix}{key}"] = str(value)


def _table(names: Sequence[str], views: Sequence[RunView]) -> str:
    rows = differences(views)
    title = f"<h3>{escape(say('runs.differences'))}</h3>"
    if not rows:
        return f'{title}<p class="empty">{escape(say("runs.no_differences"))}</p>'
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(value) or '–'}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return (
        f'{title}<div class="compared-options" tabindex="0"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _samples(names: Sequence[str], views: Sequence[RunView]) -> str:
    """The newest sample of each prompt, a row for each prompt that two or more runs share."""
    by_prompt: dict[str, list[Sample | None]] = {}
    for number, view in enumerate(views):
        for sample in sorted(view.state.samples, key=lambda sample: sample.step):
            by_prompt.setdefault(sample.prompt, [None] * len(views))[number] = sample
    shared = {prompt: row for prompt, row in by_prompt.items() if sum(sample is not None for sample in row) > 1}
    title = f"<h3>{escape(say('runs.samples'))}</h3>"
    if not shared:
        return f'{title}<p class="empty">{escape(say("runs.no_shared_samples"))}</p>'
    rows: list[str] = []
    for prompt, row in shared.items():
        cells = "".join(_cell(view, name, sample) for view, name, sample in zip(views, names, row, strict=True))
        rows.append(f'<section><h4>{escape(prompt)}</h4><div class="row">{cells}</div></section>')
    return f'{title}<div class="samples">{"".join(rows)}</div>'


def _cell(view: RunView, name: str, sample: Sample | None) -> str:
    if sample is None:
        return f"<span>{escape(name)}: –</span>"
    caption = f"{name}, {say('runs.at_step', step=sample.step)}"
    return (
        f'<a href="{file_url(view.run_id, "samples", sample.path)}" target="_blank" rel="noopener">'
        f'<img loading="lazy" src="{thumb_url(view.run_id, sample.path)}" alt="{escape(caption)}: '
        f'{escape(sample.prompt)}"><span>{escape(caption)}</span></a>'
    )
