"""The Dataset page: pictures and captions of one folder. What is shown comes from the folder at each look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from fluxgui import caption_rules, dataset_view, doctor_view
from fluxgui.dataset_doctor import Bucketing, Report, bucketing_of, crop_of, examine, token_counts
from fluxgui.dataset_history import (
    binned,
    change_captions,
    delete_pictures,
    next_undo,
    restore,
    undo,
    write_captions,
)
from fluxgui.dataset_zip import add_files
from fluxgui.datasets import (
    Dataset,
    Item,
    add_folder,
    count_tags,
    create_dataset,
    find_dataset,
    is_added,
    list_datasets,
    matching,
    read_items,
    remove_folder,
)
from fluxgui.fields import TOKENIZERS
from fluxgui.form import typed_value
from fluxgui.language import say
from fluxgui.train_tab import TrainTab
from trainer.schema.base import UserError

NUM_ON_PAGE: Final = 24
PROGRESS_SECONDS: Final = 0.3
FORM_NAMES: Final = (
    "resolution",
    "enable_bucket",
    "bucket_no_upscale",
    "min_bucket_reso",
    "max_bucket_reso",
    *TOKENIZERS,
)
Updates = dict[Block, Any]
Data = dict[Component, Any]


class View(TypedDict):
    """What part of the dataset is shown: the page of the grid, and the filters beside the search."""

    page: int
    tag: str
    only_missing: bool


FIRST_PAGE: Final[View] = {"page": 0, "tag": "", "only_missing": False}


@dataclass(frozen=True)
class DatasetTab:
    """The page's components by name. Handlers take `inputs` and give updates for some of `outputs`."""

    parts: dict[str, Block]
    inputs: set[Any]
    train: TrainTab

    @property
    def outputs(self) -> list[Any]:
        return list(self.parts.values())

    def read(self, data: Data, name: str) -> Any:
        return data[self.parts[name]]  # pyright: ignore[reportArgumentType] - only components are read

    def dataset(self, data: Data) -> Dataset | None:
        return find_dataset(self.read(data, "list"))

    def form_values(self, data: Data) -> dict[str, object]:
        """The Train page's values that the check depends on, by name."""
        return {name: typed_value(self.train.fields[name], data[self.train.form[name]]) for name in FORM_NAMES}

    # ------------------------------------------------------------------------------------------- showing

    def arrive(self, name: str | None) -> Updates:
        """The page with the dataset of that name, else the first one."""
        datasets = list_datasets()
        chosen = next((each for each in datasets if each.name == name), datasets[0] if datasets else None)
        return self.choose(chosen)

    def come_back(self, data: Data) -> Updates:
        """The page as it was left, with the folder as it is now. Before the address was read there is nothing to show."""
        if not self.read(data, "arrived"):
            return {}
        dataset = self.dataset(data)
        if dataset is None:
            return self.arrive(None)
        choices = gr.update(choices=[each.name for each in list_datasets()])
        return {**self.again(data), self.parts["list"]: choices}

    def choose(self, dataset: Dataset | None) -> Updates:
        """Show a dataset from its start: no filter, no selection, no picture open."""
        names = [each.name for each in list_datasets()]
        parts = self.parts
        cleared: Updates = {
            parts["list"]: gr.update(choices=names, value=dataset.name if dataset is not None else None),
            parts["search"]: "",
            parts["said"]: "",
            parts["preview"]: "",
            parts["doctor"]: "",
            parts["buckets"]: "",
            parts["checking"]: "",
        }
        if dataset is None:
            return cleared | {
                parts["empty"]: gr.update(visible=True),
                parts["chooser"]: gr.update(visible=False),
                parts["whole"]: gr.update(visible=False),
                parts["doctor_box"]: gr.update(visible=False),
                parts["captions_box"]: gr.update(visible=False),
                parts["adding"]: gr.update(open=True),
            }
        return cleared | {
            parts["empty"]: gr.update(visible=False),
            parts["chooser"]: gr.update(visible=True),
            parts["whole"]: gr.update(visible=True),
            parts["doctor_box"]: gr.update(visible=True),
            parts["captions_box"]: gr.update(visible=True),
            parts["caption_status"]: "",
            parts["caption_timer"]: gr.update(active=True),  # looks once for a job that is under way
            parts["forget"]: gr.update(visible=is_added(dataset)),
            **self.show(dataset, FIRST_PAGE, "", [], None),
        }

    def show(
        self,
        dataset: Dataset,
        view: View,
        search: str,
        selected: Sequence[str],
        opened: str | None,
        *,
        grid: bool = True,
        bucketing: Bucketing | None = None,
    ) -> Updates:
        """What the folder holds now, through the filters. Without `grid` the cards stay, where somebody is typing."""
        parts = self.parts
        items = read_items(dataset)
        shown = matching(items, search=search, tag=view["tag"], only_missing=view["only_missing"])
        there = {item.name for item in items}
        chosen = [name for name in selected if name in there]
        num_pages = max(1, -(-len(shown) // NUM_ON_PAGE))
        page = min(max(view["page"], 0), num_pages - 1)
        undoing = next_undo(dataset)
        updates: Updates = {
            parts["summary"]: dataset_view.summary(dataset, items),
            parts["tags"]: dataset_view.tags(count_tags(items), view["tag"]),
            parts["view"]: {**view, "page": page},
            parts["selected"]: chosen,
            parts["target"]: f"<p>{self._target_text(chosen, shown)}</p>",
            parts["undo"]: gr.update(
                value=say("dataset.undo_what", what=undoing) if undoing else say("dataset.undo"),
                interactive=undoing is not None,
            ),
            parts["delete"]: gr.update(interactive=bool(chosen)),
            parts["only_missing"]: view["only_missing"],
            parts["pager"]: gr.update(visible=num_pages > 1),
            parts["page_text"]: f"<p>{say('dataset.page', page=page + 1, count=num_pages)}</p>",
            parts["page_back"]: gr.update(interactive=page > 0),
            parts["page_on"]: gr.update(interactive=page < num_pages - 1),
            parts["bin"]: gr.update(choices=binned(dataset), value=[]),
        }
        if grid:
            on_page = shown[page * NUM_ON_PAGE : (page + 1) * NUM_ON_PAGE]
            nothing = say("dataset.nothing_found") if items else say("dataset.no_pictures")
            updates[parts["grid"]] = (
                dataset_view.grid(dataset, on_page, set(chosen)) if on_page else dataset_view.lines("warn", nothing)
            )
        return updates | self._show_large(dataset, shown, opened, bucketing)

    def _show_large(
        self, dataset: Dataset, shown: Sequence[Item], opened: str | None, bucketing: Bucketing | None
    ) -> Updates:
        parts = self.parts
        index = next((index for index, item in enumerate(shown) if item.name == opened), None)
        is_open = index is not None
        updates: Updates = {
            parts["large_box"]: gr.update(visible=is_open),
            parts["browse"]: gr.update(visible=not is_open),
            parts["opened"]: shown[index].name if index is not None else "",
        }
        if index is not None:
            item = shown[index]
            kept = crop_of(dataset.path / item.name, bucketing) if bucketing is not None else None
            overlay, words = doctor_view.crop(kept)
            updates |= {
                parts["large"]: dataset_view.large(
                    dataset, item.name, index + 1, len(shown), overlay=overlay, words=words
                ),
                parts["caption"]: gr.update(value=item.caption or "", label=say("dataset.caption_of", name=item.name)),
                parts["previous"]: gr.update(interactive=index > 0),
                parts["next"]: gr.update(interactive=index < len(shown) - 1),
            }
        return updates

    def _target_text(self, selected: Sequence[str], shown: Sequence[Item]) -> str:
        if selected:
            return say("dataset.target_selected", count=len(selected))
        return say("dataset.target_all", count=len(shown))

    def again(self, data: Data, said: str = "", *, grid: bool = True, **changes: Any) -> Updates:
        """Show the dataset anew with some of view, search, selected and opened changed."""
        dataset = self.dataset(data)
        if dataset is None:
            return self.arrive(None)
        state = {name: self.read(data, name) for name in ("view", "search", "selected", "opened")} | changes
        return {
            **self.show(
                dataset,
                state["view"],
                state["search"],
                state["selected"],
                state["opened"],
                grid=grid,
                bucketing=bucketing_of(self.form_values(data)),
            ),
            self.parts["said"]: dataset_view.done(said),
        }

    def targets(self, data: Data, dataset: Dataset) -> list[Item]:
        """What bulk changes are about: the selection, else everything that the filters leave over."""
        items, selected = read_items(dataset), set(self.read(data, "selected"))
        if selected:
            return [item for item in items if item.name in selected]
        view: View = self.read(data, "view")
        search = self.read(data, "search")
        return matching(items, search=search, tag=view["tag"], only_missing=view["only_missing"])

    # ------------------------------------------------------------------------------------------- datasets

    def create(self, data: Data) -> Updates:
        made = _try(lambda: create_dataset(str(self.read(data, "new_name") or "")))
        return {
            **self.choose(made),
            self.parts["new_name"]: "",
            self.parts["said"]: dataset_view.done(say("dataset.created", name=made.name)),
        }

    def add(self, data: Data) -> Updates:
        added = _try(lambda: add_folder(str(self.read(data, "new_path") or "")))
        return {
            **self.choose(added),
            self.parts["new_path"]: "",
            self.parts["said"]: dataset_view.done(say("dataset.added", name=added.name)),
        }

    def open_folder(self, path: str) -> Updates:
        """Show the folder at a path; it becomes a dataset where it is none."""
        dataset = _try(lambda: add_folder(path))
        return {**self.choose(dataset), self.parts["doctor_box"]: gr.update(visible=True, open=True)}

    def forget(self, data: Data) -> Updates:
        dataset = self.dataset(data)
        if dataset is None:
            return self.arrive(None)
        remove_folder(dataset)
        return {
            **self.arrive(None),
            self.parts["said"]: dataset_view.done(say("dataset.forgotten", name=dataset.name)),
        }

    def upload(self, data: Data) -> Updates:
        files = [Path(path) for path in self.read(data, "drop") or []]
        if not files:
            return {}
        dataset = self.dataset(data) or _try(lambda: create_dataset(_free_dataset_name()))
        added = _try(lambda: add_files(dataset, files))
        heading = say("dataset.taken_in", pictures=len(added.images), captions=added.num_captions)
        refused = dataset_view.lines("warn", say("dataset.left_out"), added.refused) if added.refused else ""
        return {
            **self.choose(dataset),
            self.parts["drop"]: None,
            self.parts["said"]: dataset_view.done(heading) + refused,
        }

    # ------------------------------------------------------------------------------------------- captions

    def edit_in_grid(self, data: Data, event: gr.EventData) -> Updates:
        return self._save(data, str(event.name), str(event.text), grid=False)

    def edit_found(self, data: Data, event: gr.EventData) -> Updates:
        """A caption written beside a finding: the grid shows it too."""
        return self._save(data, str(event.name), str(event.text), grid=True)

    def save_large(self, data: Data) -> Updates:
        name = str(self.read(data, "opened") or "")
        if not name:
            return {}
        return self._save(data, name, str(self.read(data, "caption") or ""), grid=True)

    def _save(self, data: Data, name: str, text: str, *, grid: bool) -> Updates:
        dataset = self.dataset(data)
        if dataset is None:
            return self.arrive(None)
        num = _try(lambda: write_captions(dataset, {name: text}, say("dataset.step_edit", name=name)))
        updates = self.again(data, say("dataset.saved", name=name) if num else "", grid=grid)
        # The box holds what is being typed.
        return {part: value for part, value in updates.items() if part is not self.parts["caption"]}

    def turn(self, data: Data, by: int) -> Updates:
        """The next or previous picture of those shown; the caption is saved first."""
        saved = self.save_large(data)
        dataset = self.dataset(data)
        opened = str(self.read(data, "opened") or "")
        if dataset is None or not opened:
            return saved
        view: View = self.read(data, "view")
        search = self.read(data, "search")
        shown = matching(read_items(dataset), search=search, tag=view["tag"], only_missing=view["only_missing"])
        names = [item.name for item in shown]
        # A picture that its new caption takes out of the filter is left for the one now in its place.
        index = names.index(opened) + by if opened in names else 0
        target = names[min(max(index, 0), len(names) - 1)] if names else None
        page = names.index(target) // NUM_ON_PAGE if target is not None else 0
        said = saved.get(self.parts["said"], "")
        return {**self.again(data, opened=target, view={**view, "page": page}), self.parts["said"]: said}

    def bulk(self, data: Data, make_rule: Callable[[], caption_rules.Rule], what: str) -> Updates:
        dataset = self.dataset(data)
        if dataset is None:
            return self.arrive(None)
        items = self.targets(data, dataset)
        num = _try(lambda: change_captions(dataset, items, make_rule(), what))
        return {**self.again(data, say("dataset.changed", count=num)), self.parts["preview"]: ""}

    def add_text(self, data: Data, kind: str) -> Updates:
        text = str(self.read(data, "text") or "").strip()
        if not text:
            raise gr.Error(say("dataset.no_text"), print_exception=False)
        rules = {
            "trigger": (caption_rules.with_trigger, say("dataset.step_trigger", text=text)),
            "prefix": (caption_rules.with_prefix, say("dataset.step_prefix", text=text)),
            "suffix": (caption_rules.with_suffix, say("dataset.step_suffix", text=text)),
        }
        rule, what = rules[kind]
        return self.bulk(data, lambda: rule(text), what)

    def _replacing(self, data: Data) -> caption_rules.Rule:
        return caption_rules.replacing(
            str(self.read(data, "find") or ""),
            str(self.read(data, "replace") or ""),
            is_regex=bool(self.read(data, "is_regex")),
        )

    def preview(self, data: Data) -> Updates:
        dataset = self.dataset(data)
        if dataset is None or not self.read(data, "find"):
            return {self.parts["preview"]: ""}
        items = self.targets(data, dataset)
        try:
            rule = self._replacing(data)
            changes = [(item.name, item.caption or "", rule(item.caption or "")) for item in items]
        except UserError as error:
            return {self.parts["preview"]: dataset_view.lines("bad", str(error))}
        changes = [change for change in changes if change[1] != change[2]]
        return {self.parts["preview"]: dataset_view.preview(changes, len(items))}

    def replace(self, data: Data) -> Updates:
        find = str(self.read(data, "find") or "")
        if not find:
            raise gr.Error(say("dataset.no_find"), print_exception=False)
        return self.bulk(data, lambda: self._replacing(data), say("dataset.step_replace", text=find))

    # ------------------------------------------------------------------------------------------- check

    def check(self, data: Data) -> Iterator[Updates]:
        """Look at all pictures, with progress while it lasts."""
        dataset = self.dataset(data)
        if dataset is None:
            yield self.arrive(None)
            return
        values = self.form_values(data)
        tokenizers = [path if isinstance(path, Path) else None for path in (values[name] for name in TOKENIZERS)]
        parts = self.parts
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
        yield {**updates, **self.check_is_over()}

    def check_is_over(self, text: str = "") -> Updates:
        return {
            self.parts["checking"]: dataset_view.done(text),
            self.parts["check"]: gr.update(interactive=True),
            self.parts["stop_check"]: gr.update(visible=False),
        }

    # ------------------------------------------------------------------------------------------- bin and undo

    def delete(self, data: Data, names: Sequence[str]) -> Updates:
        dataset = self.dataset(data)
        if dataset is None:
            return self.arrive(None)
        what = say("dataset.step_delete", count=len(names))
        num = _try(lambda: delete_pictures(dataset, names, what))
        return self.again(data, say("dataset.deleted", count=num), selected=[], opened=None)

    def undo(self, data: Data) -> Updates:
        dataset = self.dataset(data)
        undone = undo(dataset) if dataset is not None else None
        if undone is None:
            return self.again(data)
        updates = self.again(data, say("dataset.undone", what=undone.what, count=undone.num_files))
        if undone.left_alone:
            updates[self.parts["said"]] += dataset_view.lines("warn", say("dataset.left_alone"), undone.left_alone)
        return updates

    def restore(self, data: Data) -> Updates:
        dataset = self.dataset(data)
        wanted = list(self.read(data, "bin") or [])
        if dataset is None or not wanted:
            return {}
        kept = restore(dataset, wanted)
        updates = self.again(data, say("dataset.restored", count=len(wanted) - len(kept)))
        if kept:
            updates[self.parts["said"]] += dataset_view.lines("warn", say("dataset.not_restored"), kept)
        return updates


def _try(work: Callable[[], Any]) -> Any:
    """The result, or the failure as a message on the page."""
    try:
        return work()
    except (OSError, UserError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def _free_dataset_name() -> str:
    taken = {dataset.name for dataset in list_datasets()}
    return next(name for number in range(1, len(taken) + 2) if (name := f"pictures-{number}") not in taken)
