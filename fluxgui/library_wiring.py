"""Which handler of the Library page answers to what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import gradio as gr
from gradio.blocks import Block

from fluxgui.jobs import cancel_job
from fluxgui.language import say
from fluxgui.library import (
    add_folder,
    delete,
    entry_id_of,
    find_entry,
    remove_folder,
    rename,
    restore,
    save_notes,
)
from fluxgui.library_jobs import MODELS, TOOL, TRY, latest_job, options_for, start_tool, start_try
from fluxgui.library_tab import QUIETLY, LibraryTab, Updates, need, refused, whole
from trainer.schema.base import UserError

LORA_IN_ADDRESS: Final = """(lora) => {
    const url = new URL(location.href);
    if (lora) url.searchParams.set("lora", lora); else url.searchParams.delete("lora");
    history.replaceState(null, "", url);
}"""


@dataclass(frozen=True)
class Controls:
    """What only its own handler needs: the box and buttons of folders and of one LoRA, and what `start_tool` takes."""

    folder: gr.Textbox
    add: gr.Button
    remove: gr.Button
    renames: gr.Button
    keep: gr.Button
    deletes: gr.Button
    tool_inputs: list[Block]


def connect(tab: LibraryTab, page: gr.Tab, controls: Controls) -> None:
    _connect_list_and_try(tab, page)
    _connect_files(tab, controls)
    _connect_tools(tab, controls)


def _connect_files(tab: LibraryTab, controls: Controls) -> None:
    """Folders, names, notes, the bin."""
    parts, chosen, outputs = tab.parts, tab.parts["chosen"], tab.outputs

    def when_added(text: str) -> Updates:
        try:
            add_folder(text)
        except UserError as error:
            raise refused(error) from None
        return {**tab.folder_list(), **tab.cards("", "newest", None)}

    def when_removed(text: str | None) -> Updates:
        remove_folder(text or "")
        return {**tab.folder_list(), **tab.cards("", "newest", None)}

    controls.add.click(when_added, [controls.folder], outputs, **QUIETLY)
    controls.remove.click(when_removed, [parts["folder_list"]], outputs, **QUIETLY)

    def when_renamed(entry_id: str | None, title: str) -> Updates:
        entry = need(entry_id)
        try:
            path = rename(entry, title)
        except UserError as error:
            raise refused(error) from None
        own = entry_id_of(path)
        return {**tab.cards("", "newest", own), **tab.show(own)}

    def when_noted(entry_id: str | None, text: str) -> None:
        save_notes(need(entry_id), text)
        gr.Info(say("library.saved"))

    controls.renames.click(when_renamed, [chosen, parts["name"]], outputs, **QUIETLY).success(
        None, [chosen], None, js=LORA_IN_ADDRESS
    )
    controls.keep.click(when_noted, [chosen, parts["notes"]], None, **QUIETLY)

    def ask(entry_id: str | None) -> dict[Block, Any]:
        entry = need(entry_id)
        return tab.question.ask(say("library.delete_ask", name=entry.title), entry.entry_id)

    binned = gr.State("")

    def when_deleted(entry_id: str) -> Updates:
        entry = need(entry_id)
        try:
            name = delete(entry)
        except UserError as error:
            raise refused(error) from None
        undo = gr.update(visible=True, value=say("library.undo", name=entry.title))
        return {tab.question.box: gr.update(visible=False), binned: name, parts["undo"]: undo} | {
            **tab.cards("", "newest", None),
            **tab.show(None),
        }

    def when_restored(name: str) -> Updates:
        try:
            path = restore(name)
        except UserError as error:
            raise refused(error) from None
        own = entry_id_of(path)
        return {parts["undo"]: gr.update(visible=False), **tab.cards("", "newest", own), **tab.show(own)}

    controls.deletes.click(ask, [chosen], tab.question.outputs, **QUIETLY)
    tab.question.yes.click(when_deleted, [tab.question.subject], [*outputs, tab.question.box, binned], **QUIETLY)
    parts["undo"].click(when_restored, [binned], outputs, **QUIETLY)


def _connect_tools(tab: LibraryTab, controls: Controls) -> None:
    parts, chosen, outputs = tab.parts, tab.parts["chosen"], tab.outputs

    def begin_tool(entry_id: str | None, *values: Any) -> Updates:
        entry = need(entry_id)
        tool, rank, form, other_id, ratio, other_ratio, name, model = values
        other = find_entry(other_id)
        try:
            start_tool(
                entry,
                tool,
                name=name,
                rank=whole(rank, "library.new_rank", least=1),
                form=form,
                other=None if other is None else other.path,
                ratios=(ratio, other_ratio),
                model=model,
            )
        except (OSError, UserError) as error:
            raise refused(error) from None
        return tab.jobs(entry)

    parts["run_tool"].click(
        begin_tool,
        [chosen, *controls.tool_inputs, tab.models["pretrained_model_name_or_path"]],
        outputs,
        show_progress="hidden",
        concurrency_limit=1,
    )


def _connect_list_and_try(tab: LibraryTab, page: gr.Tab) -> None:
    """List, choice, and the jobs of *Try it*."""
    parts, outputs = tab.parts, tab.outputs
    chosen = parts["chosen"]
    listing = [parts["search"], parts["order"], chosen]

    def choose(search: str, order: str, _before: str | None, event: gr.EventData) -> Updates:
        own = str(event._data["id"])  # pyright: ignore[reportPrivateUsage] - gradio's one way to what was clicked
        return {**tab.show(own), **tab.cards(search, order, own)}

    parts["cards"].click(choose, listing, outputs, **QUIETLY).then(None, [chosen], None, js=LORA_IN_ADDRESS)
    for event in (parts["search"].change, parts["order"].change, page.select):
        event(tab.cards, listing, [parts["cards"]], trigger_mode="always_last", **QUIETLY)

    def begin(entry_id: str | None, *values: Any) -> Updates:
        entry = need(entry_id)
        prompts, strengths, checkpoint_ids, seed, size, steps, *paths = values
        found = [find_entry(each) for each in checkpoint_ids or ()]
        given = {name: path.strip() for name, path in zip(tab.models, paths, strict=True)}
        # Precision, swap and the like stay those of the run.
        options = {name: value for name, value in options_for(entry).items() if name not in MODELS}
        try:
            start_try(
                entry,
                [each.path for each in found if each is not None],
                prompts=prompts,
                seed=whole(seed, "library.seed", least=0),
                strengths=[float(value) for value in strengths],
                size=whole(size, "library.picture_size", least=64),
                steps=whole(steps, "library.num_steps", least=1),
                options={**options, **{name: path for name, path in given.items() if path}},
            )
        except (OSError, UserError) as error:
            raise refused(error) from None
        return tab.jobs(entry)

    def look(search: str, order: str, entry_id: str | None) -> Updates:
        updates = tab.jobs(find_entry(entry_id))
        # What a tool has just written is in the list without being asked for.
        is_over = updates[parts["timer"]]["active"] is False
        return {**updates, **tab.cards(search, order, entry_id)} if is_over else updates

    inputs = [chosen, *(parts[name] for name in ("prompts", "strengths", "checkpoints", "seed", "size", "steps"))]
    parts["make"].click(begin, [*inputs, *tab.models.values()], outputs, show_progress="hidden", concurrency_limit=1)
    parts["timer"].tick(look, listing, outputs, trigger_mode="once", **QUIETLY)
    for button, kind in ((parts["cancel"], TRY), (parts["cancel_tool"], TOOL)):
        button.click(_canceller(tab, kind), [chosen], outputs, **QUIETLY)


def _canceller(tab: LibraryTab, kind: str) -> Callable[[str | None], Updates]:
    def cancel(entry_id: str | None) -> Updates:
        entry = need(entry_id)
        view = latest_job(kind, entry)
        if view is not None and view.is_live:
            cancel_job(view.job)
        return tab.jobs(entry)

    return cancel
