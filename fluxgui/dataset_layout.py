"""Layout of the Dataset page, and which handler answers to what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from fluxgui import dataset_view, doctor_view
from fluxgui.caption_panel import build_caption_panel, connect_caption_panel
from fluxgui.dataset_tab import FIRST_PAGE, FORM_NAMES, Data, DatasetTab, Updates, View
from fluxgui.dataset_zip import ZIP_SUFFIX
from fluxgui.datasets import find_dataset
from fluxgui.form_parts import PLAIN, html_part
from fluxgui.language import say
from fluxgui.pictures import CAPTION_SUFFIX, IMAGE_SUFFIXES, MAX_FILES
from fluxgui.train_tab import IN_ORDER as CHECK_IN_ORDER
from fluxgui.train_tab import TrainTab

EACH: Final[dict[str, Any]] = {"trigger_mode": "multiple"}
"""Where a second event that comes before the first one's answer counts too: a caption or a tick would be lost."""
IN_ORDER: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_id": "dataset", "concurrency_limit": 1}
"""One change after the other: a caption that is left is saved before what the next click does."""

TRAIN_PAGE, DATASET_PAGE = "train", "dataset"

DATASET_IN_ADDRESS: Final = """(name) => {
    const url = new URL(location.href);
    if (url.searchParams.get("tab") !== "dataset") return;
    if (name) url.searchParams.set("dataset", name);
    history.replaceState(null, "", url);
}"""

# Arrow keys turn the large picture's pages unless they move in a text; Escape closes it.
KEYS: Final = """() => {
    if (window.fluxguiPictureKeys) return;
    window.fluxguiPictureKeys = true;
    document.addEventListener("keydown", (event) => {
        const shown = document.querySelector("#picture-previous");
        if (!shown || shown.offsetParent === null || event.altKey || event.ctrlKey || event.metaKey) return;
        const typing = event.target.matches("input, textarea, select");
        const press = (id) => { document.activeElement.blur(); document.querySelector(id).click(); event.preventDefault(); };
        if (event.key === "Escape") press("#picture-close");
        else if (!typing && event.key === "ArrowLeft") press("#picture-previous");
        else if (!typing && event.key === "ArrowRight") press("#picture-next");
    });
}"""


def build_dataset_tab(train: TrainTab) -> DatasetTab:
    """Lay the page out and connect it. Call inside a `gr.Tab`. `parts["use"]` is left for the page to connect."""
    parts: dict[str, Block] = {}
    with gr.Column(elem_classes="card", visible=False) as parts["empty"]:
        html_part(f'<div class="card-title"><h2>{say("dataset.empty")}</h2><p>{say("dataset.empty_text")}</p></div>')
    with gr.Column(elem_classes="card"):
        with gr.Row(visible=False, equal_height=True) as parts["chooser"]:
            parts["list"] = gr.Dropdown(
                [], label=say("dataset.dataset"), scale=3, min_width=200, elem_id="dataset-list", filterable=True
            )
            parts["use"] = gr.Button(
                say("dataset.use"), variant="primary", scale=1, min_width=140, elem_id="dataset-use"
            )
        parts["summary"] = html_part(elem_id="dataset-summary")
        with gr.Accordion(say("dataset.adding"), open=False, elem_id="dataset-adding") as parts["adding"]:
            with gr.Row():
                with gr.Column(min_width=240):
                    parts["new_name"] = gr.Textbox(
                        label=say("dataset.new_name"), max_lines=1, html_attributes=PLAIN, elem_id="dataset-new-name"
                    )
                    create = gr.Button(say("dataset.create"), size="sm", elem_id="dataset-create")
                with gr.Column(min_width=240):
                    parts["new_path"] = gr.Textbox(
                        label=say("dataset.new_path"), max_lines=1, html_attributes=PLAIN, elem_id="dataset-new-path"
                    )
                    add = gr.Button(say("dataset.add_folder"), size="sm", elem_id="dataset-add")
            parts["drop"] = gr.File(
                file_count="multiple",
                file_types=[*IMAGE_SUFFIXES, CAPTION_SUFFIX, ZIP_SUFFIX],
                label=say("dataset.drop", most=MAX_FILES),
                height=130,
                elem_id="dataset-drop",
            )
            parts["forget"] = gr.Button(say("dataset.forget"), size="sm", visible=False, elem_id="dataset-forget")
        parts["said"] = html_part(elem_id="dataset-said")
    with gr.Accordion(say("dataset.doctor"), open=False, visible=False, elem_id="dataset-doctor") as parts[
        "doctor_box"
    ]:
        html_part(f'<p class="empty">{say("dataset.doctor_text")}</p>')
        with gr.Row():
            parts["check"] = gr.Button(say("dataset.check"), size="sm", min_width=120, elem_id="doctor-check")
            parts["stop_check"] = gr.Button(
                say("dataset.stop_check"), size="sm", min_width=120, visible=False, elem_id="doctor-stop"
            )
        parts["checking"] = html_part(elem_id="doctor-progress")
        parts["doctor"] = _live_html(doctor_view.SCRIPT, "doctor-report")
        parts["buckets"] = html_part(elem_id="doctor-buckets")
    caption_buttons = build_caption_panel(parts)
    with gr.Row(visible=False, equal_height=False) as parts["whole"]:
        with gr.Column(scale=5, min_width=300):
            with gr.Column(elem_classes="card") as parts["browse"]:
                with gr.Row(equal_height=True):
                    parts["search"] = gr.Textbox(
                        label=say("dataset.search"),
                        max_lines=1,
                        scale=3,
                        min_width=160,
                        html_attributes=PLAIN,
                        elem_id="dataset-search",
                    )
                    parts["only_missing"] = gr.Checkbox(
                        label=say("dataset.only_missing"), scale=1, min_width=140, elem_id="dataset-only-missing"
                    )
                parts["tags"] = _live_html(dataset_view.TAGS_SCRIPT, "dataset-tags")
                parts["grid"] = _live_html(dataset_view.GRID_SCRIPT, "dataset-grid")
                with gr.Row(visible=False, equal_height=True) as parts["pager"]:
                    parts["page_back"] = gr.Button(
                        say("dataset.page_back"), size="sm", min_width=80, elem_id="page-back"
                    )
                    parts["page_text"] = html_part(elem_id="page-text")
                    parts["page_on"] = gr.Button(say("dataset.page_on"), size="sm", min_width=80, elem_id="page-on")
            with gr.Column(elem_classes="card", visible=False, elem_id="picture-large") as parts["large_box"]:
                parts["large"] = html_part(elem_id="picture-stage")
                parts["caption"] = gr.Textbox(
                    label=say("dataset.caption"), info=say("dataset.caption_info"), lines=3, elem_id="picture-caption"
                )
                with gr.Row():
                    small: dict[str, Any] = {"size": "sm", "min_width": 80}
                    parts["previous"] = gr.Button(say("dataset.previous"), elem_id="picture-previous", **small)
                    parts["next"] = gr.Button(say("dataset.next"), elem_id="picture-next", **small)
                    save = gr.Button(say("dataset.save"), variant="primary", elem_id="picture-save", **small)
                    close = gr.Button(say("dataset.close"), elem_id="picture-close", **small)
                    delete_one = gr.Button(say("dataset.delete_one"), variant="stop", elem_id="picture-delete", **small)
        with gr.Column(scale=2, min_width=280), gr.Column(elem_classes="card"):
            html_part(f'<div class="card-title"><h2>{say("dataset.bulk")}</h2></div>')
            parts["target"] = html_part(elem_id="bulk-target")
            with gr.Row():
                select_all = gr.Button(say("dataset.select_all"), size="sm", min_width=80, elem_id="select-all")
                select_none = gr.Button(say("dataset.select_none"), size="sm", min_width=80, elem_id="select-none")
            parts["undo"] = gr.Button(say("dataset.undo"), size="sm", interactive=False, elem_id="dataset-undo")
            parts["text"] = gr.Textbox(
                label=say("dataset.text"), max_lines=1, html_attributes=PLAIN, elem_id="bulk-text"
            )
            with gr.Row():
                trigger = gr.Button(say("dataset.add_trigger"), size="sm", min_width=90, elem_id="bulk-trigger")
                prefix = gr.Button(say("dataset.add_prefix"), size="sm", min_width=90, elem_id="bulk-prefix")
                suffix = gr.Button(say("dataset.add_suffix"), size="sm", min_width=90, elem_id="bulk-suffix")
            parts["find"] = gr.Textbox(
                label=say("dataset.find"), max_lines=1, html_attributes=PLAIN, elem_id="bulk-find"
            )
            parts["replace"] = gr.Textbox(
                label=say("dataset.replace_with"), max_lines=1, html_attributes=PLAIN, elem_id="bulk-replace-with"
            )
            parts["is_regex"] = gr.Checkbox(label=say("dataset.is_regex"), elem_id="bulk-regex")
            parts["preview"] = html_part(elem_id="bulk-preview")
            replace = gr.Button(say("dataset.replace"), size="sm", elem_id="bulk-replace")
            parts["delete"] = gr.Button(
                say("dataset.delete"), size="sm", variant="stop", interactive=False, elem_id="bulk-delete"
            )
            with gr.Accordion(say("dataset.bin"), open=False, elem_id="dataset-bin"):
                parts["bin"] = gr.Dropdown(
                    [], multiselect=True, label=say("dataset.in_bin"), elem_id="dataset-bin-list"
                )
                put_back = gr.Button(say("dataset.restore"), size="sm", elem_id="dataset-restore")
    parts["view"] = gr.State(FIRST_PAGE)
    parts["selected"] = gr.State([])
    parts["opened"] = gr.Textbox(visible=False)
    parts["arrived"] = gr.State(False)
    tab = DatasetTab(
        parts,
        {
            *(train.form[name] for name in FORM_NAMES),
            *(
                part
                for part in parts.values()
                if isinstance(part, Component) and not isinstance(part, gr.HTML | gr.Button | gr.Timer)
            ),
        },
        train,
    )
    buttons = {
        "create": create, "add": add, "save": save, "close": close, "delete_one": delete_one, "select_all": select_all,
        "select_none": select_none, "trigger": trigger, "prefix": prefix, "suffix": suffix, "replace": replace,
        "put_back": put_back,
    }  # fmt: skip
    _connect(tab, buttons)
    connect_caption_panel(tab, caption_buttons, **IN_ORDER)
    return tab


def _live_html(script: str, elem_id: str) -> gr.HTML:
    return gr.HTML("", elem_id=elem_id, js_on_load=script, elem_classes="part")


def _connect(tab: DatasetTab, buttons: dict[str, gr.Button]) -> None:
    parts: dict[str, Any] = dict(tab.parts)

    def when(event: Callable[..., Any], handler: Callable[..., Any], **more: Any) -> Any:
        return event(handler, tab.inputs, tab.outputs, **{**IN_ORDER, **more})

    def choose(data: Data) -> Updates:
        return tab.choose(tab.dataset(data))

    def open_picture(data: Data, event: gr.EventData) -> Updates:
        return tab.again(data, opened=str(event.name))

    def select_one(data: Data, event: gr.EventData) -> Updates:
        others = [name for name in tab.read(data, "selected") if name != event.name]
        return tab.again(data, grid=False, selected=[*others, str(event.name)] if event.on else others)

    def select_all(data: Data) -> Updates:
        dataset = tab.dataset(data)
        if dataset is None:
            return {}
        items = tab.targets({**data, parts["selected"]: []}, dataset)
        return tab.again(data, selected=[item.name for item in items])

    def filtered(data: Data) -> Updates:
        view = {**tab.read(data, "view"), "page": 0, "only_missing": bool(tab.read(data, "only_missing"))}
        return tab.again(data, view=view)

    def by_tag(data: Data, event: gr.EventData) -> Updates:
        view: View = tab.read(data, "view")
        tag = "" if view["tag"] == event.tag else str(event.tag)
        return tab.again(data, view={**view, "tag": tag, "page": 0})

    def turn_page(by: int) -> Callable[[Data], Updates]:
        def turned(data: Data) -> Updates:
            view: View = tab.read(data, "view")
            return tab.again(data, view={**view, "page": view["page"] + by})

        return turned

    when(parts["list"].input, choose).then(None, [parts["list"]], None, js=DATASET_IN_ADDRESS)
    for event in (buttons["create"].click, parts["new_name"].submit):
        when(event, tab.create).then(None, [parts["list"]], None, js=DATASET_IN_ADDRESS)
    for event in (buttons["add"].click, parts["new_path"].submit):
        when(event, tab.add).then(None, [parts["list"]], None, js=DATASET_IN_ADDRESS)
    when(parts["forget"].click, tab.forget)
    when(parts["drop"].upload, tab.upload, show_progress="minimal").then(
        None, [parts["list"]], None, js=DATASET_IN_ADDRESS
    )
    when(parts["grid"].click, open_picture).then(None, None, None, js=KEYS)
    when(parts["grid"].select, select_one, **EACH)
    when(parts["grid"].edit, tab.edit_in_grid, **EACH)

    def remove_found(data: Data, event: gr.EventData) -> Updates:
        return tab.delete(data, [str(event.name)])

    # Not in order with the rest: it may take a while, and changes nothing.
    checked = {"concurrency_id": "doctor", "concurrency_limit": 4}
    checking = when(parts["check"].click, tab.check, **checked)
    parts["stop_check"].click(
        lambda: tab.check_is_over(say("dataset.check_stopped")), None, tab.outputs, cancels=[checking], queue=False
    )
    when(parts["doctor"].click, open_picture).then(None, None, None, js=KEYS)
    when(parts["doctor"].delete, remove_found, **EACH)
    when(parts["doctor"].edit, tab.edit_found, **EACH)
    when(parts["tags"].click, by_tag)
    when(parts["search"].change, filtered, trigger_mode="always_last")
    when(parts["only_missing"].input, filtered)
    when(parts["page_back"].click, turn_page(-1))
    when(parts["page_on"].click, turn_page(1))
    when(parts["caption"].blur, tab.save_large, **EACH)
    when(buttons["save"].click, tab.save_large)
    when(parts["previous"].click, lambda data: tab.turn(data, -1))
    when(parts["next"].click, lambda data: tab.turn(data, 1))
    when(buttons["close"].click, lambda data: {**tab.save_large(data), **tab.again(data, opened=None)})
    when(buttons["delete_one"].click, lambda data: tab.delete(data, [tab.read(data, "opened")]))
    when(buttons["select_all"].click, select_all)
    when(buttons["select_none"].click, lambda data: tab.again(data, selected=[]))
    when(parts["undo"].click, tab.undo)
    for kind in ("trigger", "prefix", "suffix"):
        when(buttons[kind].click, lambda data, kind=kind: tab.add_text(data, kind))
    for event in (parts["find"].change, parts["replace"].change, parts["is_regex"].input):
        when(event, tab.preview, trigger_mode="always_last")
    when(buttons["replace"].click, tab.replace)
    when(parts["delete"].click, lambda data: tab.delete(data, tab.read(data, "selected")))
    when(buttons["put_back"].click, tab.restore)


def connect_dataset_page(tab: DatasetTab, whole: gr.Blocks, page: gr.Tab, tabs: gr.Tabs) -> None:
    """The ways between this page and the Train page."""
    train = tab.train
    list_, use, look_after = tab.parts["list"], tab.parts["use"], train.parts["look_after"]
    assert isinstance(list_, gr.Dropdown)
    assert isinstance(use, gr.Button)
    assert isinstance(look_after, gr.Button)
    image_dir = train.form["image_dir"]

    def arrive(request: gr.Request) -> Updates:
        return {**tab.arrive(request.query_params.get("dataset")), tab.parts["arrived"]: True}

    whole.load(arrive, None, tab.outputs, **IN_ORDER)
    # Pictures may have come from elsewhere meanwhile, so the folder is read anew each time the page is turned to.
    page.select(tab.come_back, tab.inputs, tab.outputs, **IN_ORDER).then(None, [list_], None, js=DATASET_IN_ADDRESS)

    def use_it(name: str | None) -> list[object]:
        dataset = find_dataset(name)
        return [gr.skip(), gr.skip()] if dataset is None else [str(dataset.path), gr.update(selected=TRAIN_PAGE)]

    # The folder may be the one that is named there already, with other pictures in it by now.
    use.click(use_it, [list_], [image_dir, tabs], show_progress="hidden").then(
        train.look_at_pictures, [image_dir], [train.parts["pictures"]], show_progress="hidden"
    ).then(train.check, train.inputs, train.outputs, **CHECK_IN_ORDER)

    def visit(data: Data) -> Updates:
        """The Train page's folder as a dataset, and the check of it."""
        return {**tab.open_folder(str(data[image_dir] or "")), tabs: gr.update(selected=DATASET_PAGE)}

    look_after.click(visit, {image_dir}, [*tab.outputs, tabs], **IN_ORDER).success(
        tab.check, tab.inputs, tab.outputs, show_progress="hidden", concurrency_id="doctor"
    ).then(None, [list_], None, js=DATASET_IN_ADDRESS)
