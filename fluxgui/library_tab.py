"""The Library page: cards of LoRAs, what one is, trying it at several strengths, and tools on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import gradio as gr
from gradio.blocks import Block

from fluxgui import library_view
from fluxgui.form_parts import PLAIN, Question, build_question, html_part
from fluxgui.jobs import cancel_job
from fluxgui.language import say
from fluxgui.library import (
    ORDERS,
    Entry,
    Order,
    add_folder,
    added_folders,
    delete,
    entry_id_of,
    find_entry,
    list_entries,
    remove_folder,
    rename,
    restore,
    save_notes,
)
from fluxgui.library_jobs import (
    FORMS,
    MODELS,
    TOOL,
    TOOLS,
    TRY,
    latest_job,
    options_for,
    start_tool,
    start_try,
    usual_prompts,
)
from trainer.schema.base import UserError

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
POLL_SECONDS: Final = 1.0
STRENGTHS: Final = ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5")
USUAL_STRENGTHS: Final = ("0", "0.5", "1", "1.5")
LORA_IN_ADDRESS: Final = """(lora) => {
    const url = new URL(location.href);
    if (lora) url.searchParams.set("lora", lora); else url.searchParams.delete("lora");
    history.replaceState(null, "", url);
}"""

Updates = dict[Block, Any]
_FIELDS: Final = {
    "pretrained_model_name_or_path": "FLUX",
    "clip_l": "CLIP-L",
    "t5xxl": "T5",
    "ae": "AE",
    "clip_l_tokenizer": "CLIP-L tokenizer",
    "t5xxl_tokenizer": "T5 tokenizer",
}


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


def build_library_tab(page: gr.Tab) -> LibraryTab:
    """Lay the page out and connect it. Call inside its `gr.Tab`, `page`, at whose visits the list is read anew."""
    parts: dict[str, Any] = {"chosen": gr.Textbox(visible=False), "timer": gr.Timer(POLL_SECONDS, active=False)}
    with gr.Column(elem_classes="card"):
        html_part(_title("library.title", "library.title_help"))
        with gr.Row(elem_classes="fields"):
            parts["search"] = gr.Textbox(
                label=say("library.search"),
                info=say("library.search_help"),
                max_lines=1,
                html_attributes=PLAIN,
                elem_id="library-search",
            )
            parts["order"] = gr.Dropdown(
                [(say(f"library.order_{order}"), order) for order in ORDERS],
                value=ORDERS[0],
                label=say("library.order"),
                filterable=False,
                elem_id="library-order",
            )
        parts["cards"] = gr.HTML("", elem_id="library-cards", js_on_load=library_view.CARDS_SCRIPT, elem_classes="part")
        parts["undo"] = gr.Button(visible=False, size="sm", elem_id="library-undo")
        with gr.Accordion(say("library.folders"), open=False):
            folder = gr.Textbox(
                label=say("library.add_folder"),
                info=say("library.add_folder_help"),
                max_lines=1,
                html_attributes=PLAIN,
                elem_id="library-folder",
            )
            add = gr.Button(say("library.add"), size="sm", elem_id="library-add")
            parts["folder_list"] = gr.Dropdown(
                [], label=say("library.shown_folder"), visible=False, elem_id="library-folders"
            )
            remove = gr.Button(say("library.remove"), size="sm", elem_id="library-remove")
    with gr.Column(visible=False, elem_id="library-details") as column:
        parts["details_column"] = column
        with gr.Column(elem_classes="card"):
            parts["details"] = html_part(elem_id="library-facts")
            with gr.Row(equal_height=False):
                with gr.Column(min_width=260):
                    parts["name"] = gr.Textbox(
                        label=say("library.name"), max_lines=1, max_length=100, elem_id="library-name"
                    )
                    renames = gr.Button(say("library.rename"), size="sm", elem_id="library-rename")
                with gr.Column(min_width=260):
                    parts["notes"] = gr.Textbox(
                        label=say("library.notes"), lines=2, max_lines=8, elem_id="library-notes"
                    )
                    keep = gr.Button(say("library.save_notes"), size="sm", elem_id="library-save-notes")
            deletes = gr.Button(say("library.delete"), size="sm", elem_id="library-delete")
            question = build_question("library-delete", yes=say("library.delete_yes"), no=say("library.delete_no"))
            with gr.Accordion(say("library.training"), open=False):
                parts["metadata"] = html_part(elem_id="library-metadata")
        models = _build_try_card(parts)
        tool_inputs = _build_tools_card(parts)
    tab = LibraryTab(parts, models, question)
    _connect(tab, page)
    chosen, outputs = parts["chosen"], tab.outputs

    def when_added(text: str) -> Updates:
        try:
            add_folder(text)
        except UserError as error:
            raise _refused(error) from None
        return {**tab.folder_list(), **tab.cards("", "newest", None)}

    def when_removed(text: str | None) -> Updates:
        remove_folder(text or "")
        return {**tab.folder_list(), **tab.cards("", "newest", None)}

    add.click(when_added, [folder], outputs, **QUIETLY)
    remove.click(when_removed, [parts["folder_list"]], outputs, **QUIETLY)

    def when_renamed(entry_id: str | None, title: str) -> Updates:
        entry = _need(entry_id)
        try:
            path = rename(entry, title)
        except UserError as error:
            raise _refused(error) from None
        own = entry_id_of(path)
        return {**tab.cards("", "newest", own), **tab.show(own)}

    def when_noted(entry_id: str | None, text: str) -> None:
        save_notes(_need(entry_id), text)
        gr.Info(say("library.saved"))

    renames.click(when_renamed, [chosen, parts["name"]], outputs, **QUIETLY).success(
        None, [chosen], None, js=LORA_IN_ADDRESS
    )
    keep.click(when_noted, [chosen, parts["notes"]], None, **QUIETLY)

    def ask(entry_id: str | None) -> dict[Block, Any]:
        entry = _need(entry_id)
        return question.ask(say("library.delete_ask", name=entry.title), entry.entry_id)

    binned = gr.State("")

    def when_deleted(entry_id: str) -> Updates:
        entry = _need(entry_id)
        try:
            name = delete(entry)
        except UserError as error:
            raise _refused(error) from None
        undo = gr.update(visible=True, value=say("library.undo", name=entry.title))
        return {question.box: gr.update(visible=False), binned: name, parts["undo"]: undo} | {
            **tab.cards("", "newest", None),
            **tab.show(None),
        }

    def when_restored(name: str) -> Updates:
        try:
            path = restore(name)
        except UserError as error:
            raise _refused(error) from None
        own = entry_id_of(path)
        return {parts["undo"]: gr.update(visible=False), **tab.cards("", "newest", own), **tab.show(own)}

    deletes.click(ask, [chosen], question.outputs, **QUIETLY)
    question.yes.click(when_deleted, [question.subject], [*outputs, question.box, binned], **QUIETLY)
    parts["undo"].click(when_restored, [binned], outputs, **QUIETLY)

    def begin_tool(entry_id: str | None, *values: Any) -> Updates:
        entry = _need(entry_id)
        tool, rank, form, other_id, ratio, other_ratio, name, model = values
        other = find_entry(other_id)
        try:
            start_tool(
                entry,
                tool,
                name=name,
                rank=_whole(rank, "library.new_rank", least=1),
                form=form,
                other=None if other is None else other.path,
                ratios=(ratio, other_ratio),
                model=model,
            )
        except (OSError, UserError) as error:
            raise _refused(error) from None
        return tab.jobs(entry)

    parts["run_tool"].click(
        begin_tool,
        [chosen, *tool_inputs, models["pretrained_model_name_or_path"]],
        outputs,
        show_progress="hidden",
        concurrency_limit=1,
    )
    return tab


def _build_try_card(parts: dict[str, Any]) -> dict[str, gr.Textbox]:
    with gr.Column(elem_classes="card"):
        html_part(_title("library.try_title", "library.try_help"))
        parts["prompts"] = gr.Textbox(
            label=say("library.prompts"), info=say("library.prompts_help"), lines=3, max_lines=10, elem_id="try-prompts"
        )
        parts["strengths"] = gr.CheckboxGroup(
            [(value, value) for value in STRENGTHS],
            value=list(USUAL_STRENGTHS),
            label=say("library.strengths"),
            elem_id="try-strengths",
        )
        parts["checkpoints"] = gr.Dropdown(
            [],
            multiselect=True,
            label=say("library.checkpoints"),
            info=say("library.checkpoints_help"),
            elem_id="try-checkpoints",
        )
        with gr.Row(elem_classes="fields"):
            for name, label, info in (
                ("seed", "library.seed", "library.seed_help"),
                ("size", "library.picture_size", None),
                ("steps", "library.num_steps", None),
            ):
                value = {"seed": "42", "size": "512", "steps": "20"}[name]
                parts[name] = gr.Textbox(
                    value=value,
                    label=say(label),
                    info=None if info is None else say(info),
                    max_lines=1,
                    html_attributes=PLAIN,
                    elem_id=f"try-{name}",
                )
        with gr.Accordion(say("library.models"), open=False):
            html_part(f"<p>{say('library.models_help')}</p>")
            models = {
                name: gr.Textbox(label=label, max_lines=1, html_attributes=PLAIN, elem_id=f"try-{name}")
                for name, label in _FIELDS.items()
            }
        with gr.Row():
            parts["make"] = gr.Button(say("library.make"), variant="primary", size="sm", elem_id="try-make")
            parts["cancel"] = gr.Button(say("library.cancel"), size="sm", visible=False, elem_id="try-cancel")
        parts["try_progress"] = html_part(elem_id="try-progress")
        parts["try_grid"] = html_part(elem_id="try-grid")
    return models


def _build_tools_card(parts: dict[str, Any]) -> list[Block]:
    """Returns what `start_tool` takes, in the order in which the handler reads it."""
    with gr.Column(elem_classes="card"):
        html_part(_title("library.tools", "library.tools_help"))
        with gr.Row(elem_classes="fields"):
            tool = gr.Dropdown(
                [(say(f"library.tool_{tool.replace('-', '_')}"), tool) for tool in TOOLS],
                value=TOOLS[0],
                label=say("library.tool"),
                filterable=False,
                elem_id="tool-kind",
            )
            rank = gr.Textbox(
                value="4",
                label=say("library.new_rank"),
                max_lines=1,
                visible=False,
                html_attributes=PLAIN,
                elem_id="tool-rank",
            )
            form = gr.Dropdown(
                list(FORMS),
                value=FORMS[0],
                label=say("library.form"),
                filterable=False,
                visible=False,
                elem_id="tool-form",
            )
            parts["other"] = gr.Dropdown([], label=say("library.other"), visible=False, elem_id="tool-other")
            ratio = gr.Number(1.0, label=say("library.ratio"), visible=False, elem_id="tool-ratio")
            other_ratio = gr.Number(1.0, label=say("library.other_ratio"), visible=False, elem_id="tool-other-ratio")
            name = gr.Textbox(
                label=say("library.new_name"),
                info=say("library.new_name_help"),
                max_lines=1,
                visible=False,
                html_attributes=PLAIN,
                elem_id="tool-name",
            )
        with gr.Row():
            parts["run_tool"] = gr.Button(say("library.run_tool"), variant="primary", size="sm", elem_id="tool-run")
            parts["cancel_tool"] = gr.Button(say("library.cancel"), size="sm", visible=False, elem_id="tool-cancel")
        parts["tool_result"] = html_part(elem_id="tool-result")

    def fields_of(kind: str) -> Updates:
        """Only what the chosen tool reads is shown."""
        shown = {
            rank: kind == "resize",
            form: kind == "convert",
            parts["other"]: kind == "merge-loras",
            ratio: kind in ("merge", "merge-loras"),
            other_ratio: kind == "merge-loras",
            name: kind != "inspect",
        }
        return {part: gr.update(visible=is_shown) for part, is_shown in shown.items()}

    tool.change(fields_of, [tool], [rank, form, parts["other"], ratio, other_ratio, name], **QUIETLY)
    return [tool, rank, form, parts["other"], ratio, other_ratio, name]


def _connect(tab: LibraryTab, page: gr.Tab) -> None:
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
        entry = _need(entry_id)
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
                seed=_whole(seed, "library.seed", least=0),
                strengths=[float(value) for value in strengths],
                size=_whole(size, "library.picture_size", least=64),
                steps=_whole(steps, "library.num_steps", least=1),
                options={**options, **{name: path for name, path in given.items() if path}},
            )
        except (OSError, UserError) as error:
            raise _refused(error) from None
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
        entry = _need(entry_id)
        view = latest_job(kind, entry)
        if view is not None and view.is_live:
            cancel_job(view.job)
        return tab.jobs(entry)

    return cancel


def _need(entry_id: str | None) -> Entry:
    entry = find_entry(entry_id)
    if entry is None:
        raise gr.Error(say("library.gone"), print_exception=False)
    return entry


def _whole(text: str, label: str, *, least: int) -> int | None:
    """A whole number, None for an empty field."""
    if not text.strip():
        return None
    if not text.strip().isdecimal() or int(text) < least:
        raise gr.Error(say("library.no_number", label=say(label), text=text), print_exception=False)
    return int(text)


def _refused(error: Exception) -> gr.Error:
    return gr.Error(say("library.not_done", reason=error), print_exception=False)


def _title(title: str, text: str) -> str:
    return f'<div class="card-title"><h2>{say(title)}</h2><p>{say(text)}</p></div>'
