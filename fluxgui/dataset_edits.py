"""What the Dataset page changes in a dataset: captions one by one and in bulk, the bin, and Undo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gradio as gr

from fluxgui import caption_rules, dataset_history, dataset_view
from fluxgui.dataset_tab import NUM_ON_PAGE, Data, DatasetTab, Updates, View, attempt
from fluxgui.datasets import matching, read_items
from fluxgui.form_parts import NOTHING
from fluxgui.language import say
from trainer.schema.base import UserError


def edit_in_grid(tab: DatasetTab, data: Data, event: gr.EventData) -> Updates:
    return _save(tab, data, str(event.name), str(event.text), grid=False)


def edit_found(tab: DatasetTab, data: Data, event: gr.EventData) -> Updates:
    """A caption written beside a finding: the grid shows it too."""
    return _save(tab, data, str(event.name), str(event.text), grid=True)


def save_large(tab: DatasetTab, data: Data) -> Updates:
    name = str(tab.read(data, "opened") or "")
    if not name:
        return NOTHING
    return _save(tab, data, name, str(tab.read(data, "caption") or ""), grid=True)


def _save(tab: DatasetTab, data: Data, name: str, text: str, *, grid: bool) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    num = attempt(lambda: dataset_history.write_captions(dataset, {name: text}, say("dataset.step_edit", name=name)))
    updates = tab.again(data, say("dataset.saved", name=name) if num else "", grid=grid)
    # The box holds what is being typed.
    return {part: value for part, value in updates.items() if part is not tab.parts["caption"]}


def close(tab: DatasetTab, data: Data) -> Updates:
    """Save the caption of the large picture, if there still is one, and show the grid."""
    saved = save_large(tab, data)
    shown = tab.again(data, opened=None)
    return shown if saved is NOTHING else {**saved, **shown}


def turn(tab: DatasetTab, data: Data, by: int) -> Updates:
    """The next or previous picture of those shown; the caption is saved first."""
    saved = save_large(tab, data)
    dataset = tab.dataset(data)
    opened = str(tab.read(data, "opened") or "")
    if dataset is None or not opened:
        return saved
    view: View = tab.read(data, "view")
    search = tab.read(data, "search")
    shown = matching(read_items(dataset), search=search, tag=view["tag"], only_missing=view["only_missing"])
    names = [item.name for item in shown]
    # A picture that its new caption takes out of the filter is left for the one now in its place.
    index = names.index(opened) + by if opened in names else 0
    target = names[min(max(index, 0), len(names) - 1)] if names else None
    page = names.index(target) // NUM_ON_PAGE if target is not None else 0
    said = saved.get(tab.parts["said"], "")
    return {**tab.again(data, opened=target, view={**view, "page": page}), tab.parts["said"]: said}


def bulk(tab: DatasetTab, data: Data, make_rule: Callable[[], caption_rules.Rule], what: str) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    items = tab.targets(data, dataset)
    num = attempt(lambda: dataset_history.change_captions(dataset, items, make_rule(), what))
    return {**tab.again(data, say("dataset.changed", count=num)), tab.parts["preview"]: ""}


def add_text(tab: DatasetTab, data: Data, kind: str) -> Updates:
    text = str(tab.read(data, "text") or "").strip()
    if not text:
        raise gr.Error(say("dataset.no_text"), print_exception=False)
    rules = {
        "trigger": (caption_rules.with_trigger, say("dataset.step_trigger", text=text)),
        "prefix": (caption_rules.with_prefix, say("dataset.step_prefix", text=text)),
        "suffix": (caption_rules.with_suffix, say("dataset.step_suffix", text=text)),
    }
    rule, what = rules[kind]
    return bulk(tab, data, lambda: rule(text), what)


def _replacing(tab: DatasetTab, data: Data) -> caption_rules.Rule:
    return caption_rules.replacing(
        str(tab.read(data, "find") or ""),
        str(tab.read(data, "replace") or ""),
        is_regex=bool(tab.read(data, "is_regex")),
    )


def preview(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None or not tab.read(data, "find"):
        return {tab.parts["preview"]: ""}
    items = tab.targets(data, dataset)
    try:
        rule = _replacing(tab, data)
        changes = [(item.name, item.caption or "", rule(item.caption or "")) for item in items]
    except UserError as error:
        return {tab.parts["preview"]: dataset_view.lines("bad", str(error))}
    changes = [change for change in changes if change[1] != change[2]]
    return {tab.parts["preview"]: dataset_view.preview(changes, len(items))}


def replace(tab: DatasetTab, data: Data) -> Updates:
    find = str(tab.read(data, "find") or "")
    if not find:
        raise gr.Error(say("dataset.no_find"), print_exception=False)
    return bulk(tab, data, lambda: _replacing(tab, data), say("dataset.step_replace", text=find))


def delete(tab: DatasetTab, data: Data, names: Sequence[str]) -> Updates:
    dataset = tab.dataset(data)
    if dataset is None:
        return tab.arrive(None)
    what = say("dataset.step_delete", count=len(names))
    num = attempt(lambda: dataset_history.delete_pictures(dataset, names, what))
    return tab.again(data, say("dataset.deleted", count=num), selected=[], opened=None)


def undo(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    undone = attempt(lambda: dataset_history.undo(dataset)) if dataset is not None else None
    if undone is None:
        return tab.again(data)
    updates = tab.again(data, say("dataset.undone", what=undone.what, count=undone.num_files))
    if undone.left_alone:
        updates[tab.parts["said"]] += dataset_view.lines("warn", say("dataset.left_alone"), undone.left_alone)
    return updates


def restore(tab: DatasetTab, data: Data) -> Updates:
    dataset = tab.dataset(data)
    wanted = list(tab.read(data, "bin") or [])
    if dataset is None or not wanted:
        return NOTHING
    kept = attempt(lambda: dataset_history.restore(dataset, wanted))
    updates = tab.again(data, say("dataset.restored", count=len(wanted) - len(kept)))
    if kept:
        updates[tab.parts["said"]] += dataset_view.lines("warn", say("dataset.not_restored"), kept)
    return updates
