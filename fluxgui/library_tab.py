"""The Library page: cards of LoRAs, what one is, trying it at several strengths, and tools on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import gradio as gr
from gradio.blocks import Block

from fluxgui import library_view
from fluxgui.form_parts import Question
from fluxgui.language import say
from fluxgui.library import (
    Entry,
    Order,
    added_folders,
    entry_id_of,
    find_entry,
    list_entries,
)
from fluxgui.library_jobs import (
    TOOL,
    TRY,
    latest_job,
    options_for,
    usual_prompts,
)

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
POLL_SECONDS: Final = 1.0
STRENGTHS: Final = ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5")
USUAL_STRENGTHS: Final = ("0", "0.5", "1", "1.5")

Updates = dict[Block, Any]


@dataclass(frozen=True)
class LibraryTab:
    """The page's parts by name; `outputs` is what any action may change."""

    parts: dict[str, Any]
    models: dict[str, gr.Textbox]
    question: Question

    @property
    def outputs(self) -> list[Block]:
        return [*self.parts.values(), *self.models.values()]

    def show_at_visits(self, page: gr.Blocks) -> None:
        """A visit shows the LoRA that the address names."""

        def arrive(request: gr.Request) -> Updates:
            entry_id = request.query_params.get("lora")
            return {**self.cards("", "newest", entry_id), **self.show(entry_id), **self.folder_list()}

        page.load(arrive, None, self.outputs, **QUIETLY)

    def cards(self, search: str, order: str, chosen: str | None) -> Updates:
        entries = list_entries(search, cast("Order", order))
        html = library_view.cards(entries, chosen, is_search=bool(search.strip()))
        return {self.parts["cards"]: html}

    def folder_list(self) -> Updates:
        folders = [str(folder) for folder in added_folders()]
        return {self.parts["folder_list"]: gr.update(choices=folders, value=None, visible=bool(folders))}

    def show(self, entry_id: str | None) -> Updates:
        """All about one LoRA, with fields filled for it; nothing when it is not there."""
        parts, entry = self.parts, find_entry(entry_id)
        if entry is None:
            return {parts["chosen"]: None, parts["details_column"]: gr.update(visible=False)}
        options = options_for(entry)
        names = [(path.stem, entry_id_of(path)) for path in entry.checkpoints]
        others = [(other.title, other.entry_id) for other in list_entries() if other.entry_id != entry.entry_id]
        return {
            parts["chosen"]: entry.entry_id,
            parts["details_column"]: gr.update(visible=True),
            parts["details"]: library_view.details(entry),
            parts["metadata"]: library_view.metadata_table(entry.facts.metadata),
            parts["name"]: entry.title,
            parts["notes"]: entry.notes,
            parts["checkpoints"]: gr.update(choices=[*names, *others], value=[entry.entry_id]),
            parts["prompts"]: usual_prompts(entry),
            parts["other"]: gr.update(choices=others, value=None),
            **{box: options.get(name, "") for name, box in self.models.items()},
            **self.jobs(entry),
        }

    def jobs(self, entry: Entry | None) -> Updates:
        """How the newest jobs of this LoRA stand."""
        parts = self.parts
        if entry is None:
            return {parts["timer"]: gr.update(active=False)}
        tried, tool = latest_job(TRY, entry), latest_job(TOOL, entry)
        is_trying = tried is not None and tried.is_live
        is_working = tool is not None and tool.is_live
        return {
            parts["try_progress"]: library_view.progress(tried),
            parts["try_grid"]: library_view.try_grid(tried),
            parts["make"]: gr.update(interactive=not is_trying),
            parts["cancel"]: gr.update(visible=is_trying),
            parts["tool_result"]: library_view.tool_result(tool),
            parts["run_tool"]: gr.update(interactive=not is_working),
            parts["cancel_tool"]: gr.update(visible=is_working),
            parts["timer"]: gr.update(active=is_trying or is_working),
        }


def need(entry_id: str | None) -> Entry:
    entry = find_entry(entry_id)
    if entry is None:
        raise gr.Error(say("library.gone"), print_exception=False)
    return entry


def whole(text: str, label: str, *, least: int) -> int | None:
    """A whole number, None for an empty field."""
    if not text.strip():
        return None
    if not text.strip().isdecimal() or int(text) < least:
        raise gr.Error(say("library.no_number", label=say(label), text=text), print_exception=False)
    return int(text)


def refused(error: Exception) -> gr.Error:
    return gr.Error(say("library.not_done", reason=error), print_exception=False)
