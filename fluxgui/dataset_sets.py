"""What the Dataset page does with whole datasets: make one, add a folder, take one off the list, take files in."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from fluxgui import dataset_view
from fluxgui.dataset_tab import Data, DatasetTab, Updates, attempt
from fluxgui.dataset_zip import add_files
from fluxgui.datasets import add_folder, create_dataset, list_datasets, remove_folder
from fluxgui.form_parts import NOTHING
from fluxgui.language import say


def choose(tab: DatasetTab, data: Data) -> Updates:
    """Show the dataset chosen in the list. A list that is only left says so too: then everything stays as it is."""
    dataset = tab.dataset(data)
    if dataset is not None and dataset.name == tab.read(data, "shown"):
        return NOTHING
    return tab.choose(dataset)


def create(tab: DatasetTab, data: Data) -> Updates:
    made = attempt(lambda: create_dataset(str(tab.read(data, "new_name") or "")))
    return {
        **tab.choose(made),
        tab.parts["new_name"]: "",
        tab.parts["said"]: dataset_view.done(say("dataset.created", name=made.name)),
    }


def add(tab: DatasetTab, data: Data) -> Updates:
    added = attempt(lambda: add_folder(str(tab.read(data, "new_path") or "")))
    return {
        **tab.choose(added),
        tab.parts["new_path"]: "",
        tab.parts["said"]: dataset_view.done(say("dataset.added", name=added.name)),
    }


def open_folder(tab: DatasetTab, path: str) -> Updates:
    """Show the folder at a path; it becomes a dataset where it is none."""
    dataset = attempt(lambda: add_folder(path))
    return {**tab.choose(dataset), tab.parts["doctor_box"]: gr.update(visible=True, open=True)}


def forget(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    remove_folder(dataset)
    return {
        **tab.arrive(None),
        tab.parts["said"]: dataset_view.done(say("dataset.forgotten", name=dataset.name)),
    }


def upload(tab: DatasetTab, data: Data) -> Updates:
    files = [Path(path) for path in tab.read(data, "drop") or []]
    if not files:
        return NOTHING
    dataset = tab.dataset(data) or attempt(lambda: create_dataset(_free_dataset_name()))
    added = attempt(lambda: add_files(dataset, files))
    heading = say("dataset.taken_in", pictures=len(added.images), captions=added.num_captions)
    refused = dataset_view.lines("warn", say("dataset.left_out"), added.refused) if added.refused else ""
    return {
        **tab.choose(dataset),
        tab.parts["drop"]: None,
        tab.parts["said"]: dataset_view.done(heading) + refused,
    }


def _free_dataset_name() -> str:
    taken = {dataset.name for dataset in list_datasets()}
    return next(name for number in range(1, len(taken) + 2) if (name := f"pictures-{number}") not in taken)
