"""The check of all pictures on the Dataset page: its progress, its report, its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import gradio as gr

from fluxgui import dataset_view, doctor_view
from fluxgui.dataset_doctor import Report, bucketing_of, examine, token_counts
from fluxgui.dataset_tab import Data, DatasetTab, Updates
from fluxgui.datasets import read_items
from fluxgui.fields import TOKENIZERS

PROGRESS_SECONDS: Final = 0.3


def check(tab: DatasetTab, data: Data) -> Iterator[Updates]:
    """Look at all pictures, with progress while it lasts."""
    dataset = tab.dataset(data)
    if dataset is None:
        yield tab.arrive(None)
        return
    values = tab.form_values(data)
    tokenizers = [path if isinstance(path, Path) else None for path in (values[name] for name in TOKENIZERS)]
    parts = tab.parts
    yield {
        parts["checking"]: doctor_view.progress(0, 1),
        parts["check"]: gr.update(interactive=False),
        parts["stop_check"]: gr.update(visible=True),
    }
    shown_at = time.monotonic()
    updates: Updates = {}
    try:
        for step in examine(dataset, bucketing_of(values), token_counts(*tokenizers)):
            if isinstance(step, Report):
                items = {item.name: item for item in read_items(dataset)}
                updates = {
                    parts["doctor"]: doctor_view.report(dataset, step, items),
                    parts["buckets"]: doctor_view.buckets(step),
                }
            elif time.monotonic() - shown_at > PROGRESS_SECONDS:
                shown_at = time.monotonic()
                yield {parts["checking"]: doctor_view.progress(*step)}
    except OSError as error:
        updates = {parts["doctor"]: dataset_view.lines("bad", str(error))}
    yield {**updates, **check_is_over(tab)}


def check_is_over(tab: DatasetTab, text: str = "") -> Updates:
    return {
        tab.parts["checking"]: dataset_view.done(text),
        tab.parts["check"]: gr.update(interactive=True),
        tab.parts["stop_check"]: gr.update(visible=False),
    }
