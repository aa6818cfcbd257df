"""Repeats and masks on the Dataset page: what is set, setting it for the selection, taking masks in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block

from fluxgui import dataset_view
from fluxgui.dataset_extras import (
    add_masks,
    add_white_masks,
    delete_masks,
    set_folder_repeats,
    set_repeats,
)
from fluxgui.dataset_tab import Data, DatasetTab, Updates, attempt
from fluxgui.form_parts import NOTHING, html_part
from fluxgui.language import say
from fluxgui.pictures import IMAGE_SUFFIXES, MAX_FILES


def build_extras_panel(parts: dict[str, Block]) -> dict[str, gr.Button]:
    """Lay the panel out below the bulk changes; its components go into `parts`, its buttons are given back."""
    buttons: dict[str, gr.Button] = {}
    with gr.Accordion(say("dataset.repeats"), open=False, elem_id="dataset-repeats"):
        parts["times"] = gr.Number(
            1, label=say("dataset.times"), info=say("dataset.times_info"), precision=0, elem_id="repeats-times"
        )
        buttons["set_times"] = gr.Button(say("dataset.set_times"), size="sm", elem_id="repeats-set")
        parts["folder_times"] = gr.Number(
            1,
            label=say("dataset.folder_times"),
            info=say("dataset.folder_times_info"),
            precision=0,
            elem_id="repeats-folder",
        )
        buttons["set_folder_times"] = gr.Button(
            say("dataset.set_folder_times"), size="sm", elem_id="repeats-set-folder"
        )
    with gr.Accordion(say("dataset.masks"), open=False, elem_id="dataset-masks"):
        parts["masks"] = html_part(elem_id="masks-state")
        parts["mask_drop"] = gr.File(
            file_count="multiple",
            file_types=[*IMAGE_SUFFIXES],
            label=say("dataset.mask_drop", most=MAX_FILES),
            height=130,
            elem_id="masks-drop",
        )
        buttons["white_masks"] = gr.Button(say("dataset.white_masks"), size="sm", elem_id="masks-white")
        buttons["delete_masks"] = gr.Button(
            say("dataset.delete_masks"), size="sm", variant="stop", elem_id="masks-delete"
        )
    return buttons


def set_times(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    times = tab.read(data, "times")
    num = attempt(lambda: set_repeats(dataset, tab.targets(data, dataset), times))
    return tab.again(data, say("dataset.times_set", count=num, times=times))


def set_folder_times(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    times = tab.read(data, "folder_times")
    attempt(lambda: set_folder_repeats(dataset, times))
    return tab.again(data, say("dataset.folder_times_set", times=times))


def take_masks(tab: DatasetTab, data: Data) -> Updates:
    files = [Path(path) for path in tab.read(data, "mask_drop") or []]
    dataset = tab.dataset(data)
    if dataset is None or not files:
        return NOTHING
    added = attempt(lambda: add_masks(dataset, files))
    updates = tab.again(data, say("dataset.masks_taken", count=len(added.pictures)))
    if added.refused:
        updates[tab.parts["said"]] += dataset_view.lines("warn", say("dataset.left_out"), added.refused)
    return {**updates, tab.parts["mask_drop"]: None}


def make_white_masks(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    num = attempt(lambda: add_white_masks(dataset))
    return tab.again(data, say("dataset.white_masks_made", count=num))


def remove_masks(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    num = attempt(lambda: delete_masks(dataset, tab.targets(data, dataset)))
    return tab.again(data, say("dataset.masks_deleted", count=num))


def connect_extras_panel(tab: DatasetTab, buttons: dict[str, gr.Button], **how: Any) -> None:
    drop = tab.parts["mask_drop"]
    assert isinstance(drop, gr.File)

    def by(work: Callable[[DatasetTab, Data], Updates]) -> Callable[[Data], Updates]:
        return lambda data: work(tab, data)

    shown: dict[str, Any] = {**how, "show_progress": "minimal"}
    drop.upload(by(take_masks), tab.inputs, tab.outputs, **shown)
    for name, work in (
        ("set_times", set_times),
        ("set_folder_times", set_folder_times),
        ("white_masks", make_white_masks),
        ("delete_masks", remove_masks),
    ):
        buttons[name].click(by(work), tab.inputs, tab.outputs, **how)
