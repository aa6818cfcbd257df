"""Which handler of the Dataset page answers to what, and the ways between it and the Train page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import gradio as gr

from fluxgui import dataset_check, dataset_edits, dataset_sets
from fluxgui.dataset_extras import read_extras
from fluxgui.dataset_tab import Data, DatasetTab, Updates, View
from fluxgui.datasets import Dataset, find_dataset, read_items
from fluxgui.form_parts import NOTHING
from fluxgui.language import say
from fluxgui.train_tab import IN_ORDER as CHECK_IN_ORDER

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

MASKED: Final = "masked_loss = true"
"""The line of the Train page's more options that turns masks on."""


def connect(tab: DatasetTab, buttons: dict[str, gr.Button]) -> None:
    parts: dict[str, Any] = dict(tab.parts)

    def when(event: Callable[..., Any], handler: Callable[..., Any], **more: Any) -> Any:
        return event(handler, tab.inputs, tab.outputs, **{**IN_ORDER, **more})

    def by(work: Callable[[DatasetTab, Data], Updates]) -> Callable[[Data], Updates]:
        return lambda data: work(tab, data)

    def check(data: Data) -> Iterator[Updates]:
        yield from dataset_check.check(tab, data)

    def edit_in_grid(data: Data, event: gr.EventData) -> Updates:
        return dataset_edits.edit_in_grid(tab, data, event)

    def edit_found(data: Data, event: gr.EventData) -> Updates:
        return dataset_edits.edit_found(tab, data, event)

    def open_picture(data: Data, event: gr.EventData) -> Updates:
        return tab.again(data, opened=str(event.name))

    def select_one(data: Data, event: gr.EventData) -> Updates:
        others = [name for name in tab.read(data, "selected") if name != event.name]
        return tab.again(data, grid=False, selected=[*others, str(event.name)] if event.on else others)

    def select_all(data: Data) -> Updates:
        dataset = tab.dataset(data)
        if dataset is None:
            return NOTHING
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

    when(parts["list"].input, by(dataset_sets.choose)).then(None, [parts["list"]], None, js=DATASET_IN_ADDRESS)
    for event in (buttons["create"].click, parts["new_name"].submit):
        when(event, by(dataset_sets.create)).then(None, [parts["list"]], None, js=DATASET_IN_ADDRESS)
    for event in (buttons["add"].click, parts["new_path"].submit):
        when(event, by(dataset_sets.add)).then(None, [parts["list"]], None, js=DATASET_IN_ADDRESS)
    when(parts["forget"].click, by(dataset_sets.forget))
    when(parts["drop"].upload, by(dataset_sets.upload), show_progress="minimal").then(
        None, [parts["list"]], None, js=DATASET_IN_ADDRESS
    )
    when(parts["grid"].click, open_picture).then(None, None, None, js=KEYS)
    when(parts["grid"].select, select_one, **EACH)
    when(parts["grid"].edit, edit_in_grid, **EACH)

    def remove_found(data: Data, event: gr.EventData) -> Updates:
        return dataset_edits.delete(tab, data, [str(event.name)])

    # Not in order with the rest: it may take a while, and changes nothing.
    checked = {"concurrency_id": "doctor", "concurrency_limit": 4}
    checking = when(parts["check"].click, check, **checked)
    parts["stop_check"].click(
        lambda: dataset_check.check_is_over(tab, say("dataset.check_stopped")),
        None,
        tab.outputs,
        cancels=[checking],
        queue=False,
    )
    when(parts["doctor"].click, open_picture).then(None, None, None, js=KEYS)
    when(parts["doctor"].delete, remove_found, **EACH)
    when(parts["doctor"].edit, edit_found, **EACH)
    when(parts["tags"].click, by_tag)
    when(parts["search"].change, filtered, trigger_mode="always_last")
    when(parts["only_missing"].input, filtered)
    when(parts["page_back"].click, turn_page(-1))
    when(parts["page_on"].click, turn_page(1))
    when(parts["caption"].blur, by(dataset_edits.save_large), **EACH)
    when(buttons["save"].click, by(dataset_edits.save_large))
    when(parts["previous"].click, lambda data: dataset_edits.turn(tab, data, -1))
    when(parts["next"].click, lambda data: dataset_edits.turn(tab, data, 1))
    when(buttons["close"].click, by(dataset_edits.close))
    when(buttons["delete_one"].click, lambda data: dataset_edits.delete(tab, data, [tab.read(data, "opened")]))
    when(buttons["select_all"].click, select_all)
    when(buttons["select_none"].click, lambda data: tab.again(data, selected=[]))
    when(parts["undo"].click, by(dataset_edits.undo))
    for kind in ("trigger", "prefix", "suffix"):
        when(buttons[kind].click, lambda data, kind=kind: dataset_edits.add_text(tab, data, kind))
    for event in (parts["find"].change, parts["replace"].change, parts["is_regex"].input):
        when(event, by(dataset_edits.preview), trigger_mode="always_last")
    when(buttons["replace"].click, by(dataset_edits.replace))
    when(parts["delete"].click, lambda data: dataset_edits.delete(tab, data, tab.read(data, "selected")))
    when(buttons["put_back"].click, by(dataset_edits.restore))


def says_masked_loss(lines: str | None) -> bool:
    """Whether the lines of more options set masked_loss, to whatever value."""
    return re.search(r"(?m)^\s*masked_loss\s*=", lines or "") is not None


def values_of_dataset(dataset: Dataset, lines: str | None) -> dict[str, object]:
    """What a dataset sets in the form, by field: its folder, its repeats where they are set, and the loss by masks where
    every picture has one and the lines of more options say nothing about it."""
    extras, items = read_extras(dataset), read_items(dataset)
    values: dict[str, object] = {"image_dir": str(dataset.path)}
    if extras.repeats.folder is not None:
        values["num_repeats"] = extras.repeats.folder
    if items and all(extras.mask_of(item.name) for item in items) and not says_masked_loss(lines):
        values["more_options"] = f"{lines.rstrip()}\n{MASKED}" if lines and lines.strip() else MASKED
    return values


def connect_dataset_page(tab: DatasetTab, whole: gr.Blocks, page: gr.Tab, tabs: gr.Tabs) -> None:
    """The ways between this page and the Train page."""
    train = tab.train
    list_, use, look_after = tab.parts["list"], tab.parts["use"], train.parts["look_after"]
    assert isinstance(list_, gr.Dropdown)
    assert isinstance(use, gr.Button)
    assert isinstance(look_after, gr.Button)
    image_dir, num_repeats, more = (train.form[name] for name in ("image_dir", "num_repeats", "more_options"))

    def arrive(request: gr.Request) -> Updates:
        return {**tab.arrive(request.query_params.get("dataset")), tab.parts["arrived"]: True}

    whole.load(arrive, None, tab.outputs, **IN_ORDER)
    # Pictures may have come from elsewhere meanwhile, so the folder is read anew each time the page is turned to.
    page.select(tab.come_back, tab.inputs, tab.outputs, **IN_ORDER).then(None, [list_], None, js=DATASET_IN_ADDRESS)

    def use_it(name: str | None, lines: str | None) -> Updates:
        dataset = find_dataset(name)
        if dataset is None:
            return NOTHING
        values = values_of_dataset(dataset, lines)
        if "more_options" in values:
            gr.Info(say("dataset.masks_used"))
        filled: Updates = {train.form[name]: value for name, value in values.items()}
        return {**filled, tabs: gr.update(selected=TRAIN_PAGE)}

    # The folder may be the one that is named there already, with other pictures in it by now.
    use.click(use_it, [list_, more], [image_dir, num_repeats, more, tabs], show_progress="hidden").then(
        train.look_at_pictures, [image_dir], [train.parts["pictures"]], show_progress="hidden"
    ).then(train.check, train.inputs, train.outputs, **CHECK_IN_ORDER)

    def check(data: Data) -> Iterator[Updates]:
        yield from dataset_check.check(tab, data)

    def visit(data: Data) -> Updates:
        """The Train page's folder as a dataset, and the check of it."""
        return {**dataset_sets.open_folder(tab, str(data[image_dir] or "")), tabs: gr.update(selected=DATASET_PAGE)}

    look_after.click(visit, {image_dir}, [*tab.outputs, tabs], **IN_ORDER).success(
        check, tab.inputs, tab.outputs, show_progress="hidden", concurrency_id="doctor"
    ).then(None, [list_], None, js=DATASET_IN_ADDRESS)
