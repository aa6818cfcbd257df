"""The Dataset page: pictures and captions of one folder. What is shown comes from the folder at each look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from fluxgui import dataset_view, doctor_view
from fluxgui.dataset_doctor import Bucketing, bucketing_of, crop_of
from fluxgui.dataset_extras import Extras, read_extras
from fluxgui.dataset_history import (
    binned,
    next_undo,
)
from fluxgui.datasets import (
    Dataset,
    Item,
    count_tags,
    find_dataset,
    is_added,
    list_datasets,
    matching,
    read_items,
)
from fluxgui.fields import TOKENIZERS
from fluxgui.form import typed_value
from fluxgui.form_parts import NOTHING
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
            return NOTHING
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
            parts["shown"]: dataset.name if dataset is not None else None,
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
        extras = read_extras(dataset)
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
            parts["folder_times"]: extras.repeats.folder,
            parts["masks"]: dataset_view.masks_state(extras, [item.name for item in items]),
        }
        if grid:
            on_page = shown[page * NUM_ON_PAGE : (page + 1) * NUM_ON_PAGE]
            nothing = say("dataset.nothing_found") if items else say("dataset.no_pictures")
            updates[parts["grid"]] = (
                dataset_view.grid(dataset, on_page, set(chosen), extras)
                if on_page
                else dataset_view.lines("warn", nothing)
            )
        return updates | self._show_large(dataset, shown, opened, bucketing, extras)

    def _show_large(
        self,
        dataset: Dataset,
        shown: Sequence[Item],
        opened: str | None,
        bucketing: Bucketing | None,
        extras: Extras,
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
                    dataset,
                    item.name,
                    index + 1,
                    len(shown),
                    mask=extras.mask_of(item.name),
                    overlay=overlay,
                    words=words,
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


def attempt(work: Callable[[], Any]) -> Any:
    """The result, or the failure as a message on the page."""
    try:
        return work()
    except (OSError, UserError) as error:
        raise gr.Error(str(error), print_exception=False) from None
