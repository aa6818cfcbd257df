"""The Presets page: what each preset sets, the user's own ones, projects of other tools in, and projects out."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from fluxgui.exporting import FORMATS, Project, export_project
from fluxgui.fields import make_fields, option_field
from fluxgui.form import read_form
from fluxgui.form_parts import NOTHING, html_part
from fluxgui.importing import KEPT_FOR_EXPORT, as_job, dataset_text, fill_form, read_pasted
from fluxgui.language import say
from fluxgui.presets_bar import choices
from fluxgui.runs import create_and_start
from fluxgui.train_tab import IN_ORDER, TrainTab
from trainer.schema.base import UserError
from trainer.schema.import_project import ImportedProject
from trainer.schema.options import Options
from trainer.schema.presets import (
    MAX_NAME,
    Preset,
    delete_preset,
    import_preset,
    list_presets,
    load_preset,
    preset_text,
    rename_preset,
    restore_preset,
    save_preset,
)

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
MAX_SHOWN: Final = 200

Updates = dict[Block, Any]
Data = Mapping[Component, Any]

# What the page wrote is saved by the browser; the server keeps no file for it.
SAVE_AS_FILE: Final = """(name, text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/plain"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
_FILE_NAMES: Final = {
    "bash": "train_command.sh",
    "windows": "train_command.bat",
    "toml": "config.toml",
    "script": "train.sh",
    "notebook": "train_cell.py",
}


def preset_choices() -> list[tuple[str, str]]:
    return [(f"{say('presets.kind_' + preset.kind)}: {preset.title}", preset.name) for preset in list_presets()]


def label_of(name: str) -> str:
    """What the form calls a value of a preset."""
    field = make_fields().get(name)
    if field is not None:
        return field.label
    return option_field(name).label if name in Options.model_fields else name


def in_words(value: object) -> str:
    if isinstance(value, bool):
        return say("presets.on") if value else say("presets.off")
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return str(value) if value not in (None, "") else say("presets.unset")


def table(values: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{escape(label_of(name))}</td><td><code>{escape(name)}</code></td><td>{escape(in_words(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<div class="settings-table" tabindex="0"><table>{rows}</table></div>'


def describe(name: str | None) -> str:
    """What a preset is and sets."""
    if not name:
        return f'<p class="empty">{escape(say("presets.nothing_chosen"))}</p>'
    try:
        preset = load_preset(name)
    except UserError as error:
        return f'<div class="box bad" role="alert">{escape(str(error))}</div>'
    about = f"<p>{escape(preset.description)}</p>" if preset.description else ""
    return f"<h3>{escape(preset.title)}</h3>{about}<p>{escape(say('presets.sets'))}:</p>{table(preset.values)}"


def list_box(kind: str, title: str, lines: tuple[str, ...]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:MAX_SHOWN])
    return f'<div class="box {kind}"><strong>{escape(title)}</strong><ul>{items}</ul></div>'


def imported(project: ImportedProject) -> str:
    """What was understood of a project and what was not."""
    parts = [f"<h3>{escape(say('presets.kind_' + project.kind))}</h3>"]
    parts.append(list_box("warn", say("presets.not_understood"), project.not_understood))
    problems = tuple(f"{problem.what}. {problem.hint or ''}".strip() for problem in project.problems)
    parts.append(list_box("bad", say("presets.refused"), problems))
    parts.append(list_box("info", say("presets.changed"), project.changed))
    parts.append(f"<p><strong>{escape(say('presets.understood', number=len(project.values)))}</strong></p>")
    datasets = (project.dataset or {}).get("datasets")
    if isinstance(datasets, list):
        subsets = sum(len(entry.get("subsets", [])) for entry in datasets if isinstance(entry, dict))
        parts.append(f"<p>{escape(say('presets.pictures', datasets=len(datasets), subsets=subsets))}</p>")
    if project.prompts:
        parts.append(f"<p>{escape(say('presets.prompts', number=len(project.prompts.splitlines())))}</p>")
    return "".join([*parts, table(project.values)])


def fill_from(train: TrainTab, preset: Preset) -> Updates:
    """Updates that put a preset into the form: what a built-in one does not name stays as it is."""
    return train.apply_preset(preset.name) if preset.is_built_in else train.load_preset(preset.name)


def no_longer_so(source: str, form: str, exported_as: list[str] | None) -> tuple[Any, Any]:
    """Updates of the exported text and what it was made as: cleared once it was made as something else.

    A list that is only left, with nothing chosen, calls this too.
    """
    return (gr.skip(), gr.skip()) if exported_as == [source, form] else ("", None)


def build_presets_tab(train: TrainTab, tabs: gr.Tabs, page: gr.Tab) -> None:
    """Lay the page out and connect it to the form. Call inside its `gr.Tab`, `page`, at whose visits the list is read anew."""
    with gr.Column(elem_classes="card"):
        html_part(_title("presets.title", "presets.title_help"))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                chosen = gr.Dropdown(
                    preset_choices(), value=None, label=say("presets.list"), filterable=False, elem_id="presets-list"
                )
                with gr.Row():
                    load = _button("presets.load", "presets-load", variant="primary")
                    export = _button("presets.export_file", "presets-export")
                name = gr.Textbox(
                    label=say("presets.new_name"),
                    info=say("presets.new_name_help"),
                    max_lines=1,
                    max_length=MAX_NAME,
                    elem_id="presets-name",
                )
                with gr.Row():
                    duplicate = _button("presets.duplicate", "presets-duplicate")
                    rename = _button("presets.rename", "presets-rename")
                    delete = _button("presets.delete", "presets-delete")
                undo = _button("presets.undo_delete", "presets-undo", visible=False)
                upload = gr.UploadButton(
                    say("presets.import_file"), file_types=[".toml"], size="sm", elem_id="presets-upload"
                )
            with gr.Column(scale=3, min_width=280):
                details = html_part(describe(None), elem_id="presets-details")
    with gr.Column(elem_classes="card"):
        html_part(_title("presets.import_title", "presets.import_help"))
        pasted = gr.Textbox(
            label=say("presets.pasted"), lines=7, max_lines=20, elem_id="import-text", elem_classes="code-box"
        )
        with gr.Accordion(say("presets.files"), open=False):
            files = gr.Textbox(
                label=say("presets.files"),
                info=say("presets.files_help"),
                lines=4,
                max_lines=16,
                elem_id="import-files",
                elem_classes="code-box",
            )
        with gr.Row():
            read = _button("presets.read", "import-read", variant="primary")
            fill = _button("presets.fill", "import-fill", visible=False)
            exactly = _button("presets.start_exactly", "import-start", visible=False)
        result = html_part(elem_id="import-result")
        left_out = html_part(elem_id="import-left-out")
    with gr.Column(elem_classes="card"):
        html_part(_title("presets.export_title", "presets.export_help"))
        with gr.Row(elem_classes="fields"):
            source = gr.Dropdown(
                [(say("presets.source_form"), "form"), (say("presets.source_import"), "import")],
                value="form",
                label=say("presets.source"),
                filterable=False,
                elem_id="export-source",
            )
            form = gr.Dropdown(
                [(say(f"presets.format_{each}"), each) for each in FORMATS],
                value=FORMATS[0],
                label=say("presets.format"),
                filterable=False,
                elem_id="export-format",
            )
        with gr.Row():
            write = _button("presets.write", "export-write", variant="primary")
            download = _button("presets.download", "export-download")
        exported = gr.Textbox(
            label=say("presets.exported"),
            lines=5,
            max_lines=24,
            interactive=False,
            buttons=["copy"],
            elem_id="export-text",
            elem_classes="code-box",
        )
    exported_as = gr.State(None)
    gone = gr.State(None)
    to_save = gr.Textbox(visible=False)
    file_name = gr.Textbox(visible=False)
    lists: list[Block] = [chosen, details, train.presets.own, name, undo, gone]

    def lists_now(shown: str | None) -> Updates:
        return {
            chosen: gr.update(choices=preset_choices(), value=shown),
            details: describe(shown),
            train.presets.own: gr.update(choices=choices("own")),
        }

    def copy(old: str | None, new: str | None) -> Updates:
        preset = _preset(old)
        wanted = (new or "").strip() or _free_copy(preset)
        with _Telling():
            save_preset(wanted, preset.values, description=preset.description, overwrite=False)
        gr.Info(say("presets.duplicated", old=preset.title, new=wanted))
        return {**lists_now(wanted), name: ""}

    def call(old: str | None, new: str | None) -> Updates:
        preset = _own(old)
        wanted = (new or "").strip()
        if not wanted:
            raise _problem(say("presets.name_first"))
        with _Telling():
            rename_preset(preset.name, wanted)
        gr.Info(say("presets.renamed", old=preset.name, new=wanted))
        return {**lists_now(wanted), name: ""}

    def drop(old: str | None) -> Updates:
        preset = _own(old)
        with _Telling():
            place = delete_preset(preset.name)
        gr.Info(say("presets.deleted", name=preset.name))
        return {**lists_now(None), undo: gr.update(visible=True), gone: (str(place), preset.name)}

    def take_back(what: tuple[str, str] | None) -> Updates:
        if what is None:
            return NOTHING
        with _Telling():
            restore_preset(Path(what[0]), what[1])
        gr.Info(say("presets.restored", name=what[1]))
        return {**lists_now(what[1]), undo: gr.update(visible=False), gone: None}

    def take_in(path: str | None) -> Updates:
        if not path:
            return NOTHING
        with _Telling():
            try:
                text = Path(path).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(str(error)) from None
            saved = import_preset(text, Path(path).stem)
        gr.Info(say("presets.imported", name=saved.name))
        return lists_now(saved.name)

    def load_chosen(chosen_name: str | None) -> Updates:
        preset = _preset(chosen_name)
        gr.Info(say("presets.loaded", name=preset.title))
        return {**fill_from(train, preset), tabs: gr.update(selected="train")}

    def as_file(chosen_name: str | None) -> tuple[str, str]:
        preset = _preset(chosen_name)
        return f"{preset.name}.toml", preset_text(preset)

    def look(text: str | None, more: str | None) -> Updates:
        try:
            project = read_pasted(text, more)
        except UserError as error:
            hidden = gr.update(visible=False)
            return {
                result: list_box("bad", str(error), ("",)).replace("<ul><li></li></ul>", ""),
                fill: hidden,
                exactly: hidden,
                left_out: "",
            }
        shown = gr.update(visible=True)
        return {result: imported(project), fill: shown, exactly: shown, left_out: "", source: "import"}

    def show(text: str | None, more: str | None) -> Updates:
        with _Telling():
            filling = fill_form(read_pasted(text, more))
        gr.Info(say("presets.filled"))
        return {
            **train.take_over(filling.values),
            left_out: list_box("warn", say("presets.not_in_form"), filling.left_out),
            # What the form has no place for stands here, where it has to be read first.
            **({} if filling.left_out else {tabs: gr.update(selected="train")}),
        }

    def start(text: str | None, more: str | None) -> str:
        try:
            job = as_job(read_pasted(text, more))
            run = create_and_start(
                job.name,
                config_toml=job.config_toml,
                dataset_toml=job.dataset_toml,
                sample_prompts=job.sample_prompts,
                info={"imported": True},
            )
        except (OSError, UserError) as error:
            raise _problem(say("presets.cannot_start", reason=error)) from None
        return run.path.name

    def export_text(data: Data) -> Updates:
        text = _exported(train, data, data[source], data[form], data[pasted], data[files])
        return {exported: text, exported_as: [data[source], data[form]]}

    read.click(look, [pasted, files], [result, fill, exactly, left_out, source], **QUIETLY)
    filled = [
        load.click(load_chosen, [chosen], [*train.taken_over, tabs], **QUIETLY),
        fill.click(show, [pasted, files], [*train.taken_over, left_out, tabs], **QUIETLY),
    ]
    for event in filled:
        event.success(train.check, train.inputs, train.outputs, **IN_ORDER)
    exactly.click(start, [pasted, files], [train.parts["started"]], show_progress="minimal", concurrency_limit=1)
    write.click(export_text, {*train.inputs, source, form, pasted, files}, [exported, exported_as], **QUIETLY)
    for choice in (form, source):
        choice.input(no_longer_so, [source, form, exported_as], [exported, exported_as], **QUIETLY)
    download.click(lambda each: _FILE_NAMES[each], [form], [file_name], **QUIETLY).then(
        None, [file_name, exported], None, js=SAVE_AS_FILE
    )
    export.click(as_file, [chosen], [file_name, to_save], **QUIETLY).success(
        None, [file_name, to_save], None, js=SAVE_AS_FILE
    )
    chosen.input(describe, [chosen], [details], **QUIETLY)
    duplicate.click(copy, [chosen, name], lists, **QUIETLY)
    rename.click(call, [chosen, name], lists, **QUIETLY)
    delete.click(drop, [chosen], lists, **QUIETLY)
    undo.click(take_back, [gone], lists, **QUIETLY)
    upload.upload(take_in, [upload], lists, **QUIETLY)
    page.select(lambda: gr.update(choices=preset_choices()), None, [chosen], **QUIETLY)


def _exported(train: TrainTab, data: Data, source: str, form: str, text: str | None, more: str | None) -> str:
    project = _pasted(text, more)
    if source == "import":
        if project is None:
            raise _problem(say("presets.read_first"))
        return export_project(Project(project.options, dataset_text(project), project.prompts or ""), form)
    reading = read_form(train.values(data))
    if reading.options is None:
        reason = reading.problems[0].what if reading.problems else ""
        raise _problem(say("presets.form_wrong", reason=reason))
    options, prompts = reading.options, str(train.values(data).get("sample_prompt_lines") or "").strip()
    if project is not None and form in ("bash", "windows", "toml"):
        # Where the original had its files; in the form they belong to the run's folder.
        kept = {name: getattr(project.options, name) for name in KEPT_FOR_EXPORT}
        options = options.model_copy(update={name: value for name, value in kept.items() if value is not None})
    return export_project(Project(options, reading.dataset_toml, prompts), form)


def _pasted(text: str | None, more: str | None) -> ImportedProject | None:
    try:
        return read_pasted(text, more) if (text or "").strip() else None
    except UserError:
        return None


class _Telling:
    """Turns a `UserError` inside into a message on the page."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, (UserError, OSError)):
            raise _problem(say("presets.not_done", reason=error)) from None


def _problem(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False)


def _preset(name: str | None) -> Preset:
    if not name:
        raise _problem(say("presets.choose_first"))
    with _Telling():
        return load_preset(name)


def _own(name: str | None) -> Preset:
    preset = _preset(name)
    if preset.is_built_in:
        raise _problem(say("presets.own_only", name=preset.title))
    return preset


def _free_copy(preset: Preset) -> str:
    taken = {each.name.casefold() for each in list_presets()}
    wanted = say("presets.copy_of", name=preset.title)[: MAX_NAME - 4]
    return next(
        name
        for number in range(1, 1000)
        if (name := f"{wanted} {number}" if number > 1 else wanted).casefold() not in taken
    )


def _title(title: str, help_text: str) -> str:
    return f'<div class="card-title"><h2>{escape(say(title))}</h2><p>{escape(say(help_text))}</p></div>'


def _button(text: str, name: str, **more: Any) -> gr.Button:
    return gr.Button(say(text), size="sm", min_width=80, elem_id=name, **more)
