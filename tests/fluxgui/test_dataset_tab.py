"""What the Dataset page's handlers answer, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from fluxgui import dataset_edits, dataset_history, dataset_sets
from fluxgui.dataset_extras import add_white_masks, set_folder_repeats
from fluxgui.dataset_layout import build_dataset_tab
from fluxgui.dataset_tab import FIRST_PAGE, DatasetTab
from fluxgui.dataset_wiring import says_masked_loss, values_of_dataset
from fluxgui.datasets import Dataset, create_dataset
from fluxgui.form_parts import NOTHING
from fluxgui.train_layout import build_train_tab


@pytest.fixture(scope="module")
def tab() -> DatasetTab:
    with gr.Blocks():
        return build_dataset_tab(build_train_tab(None))


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "data"))
    dataset = create_dataset("cats")
    Image.new("RGB", (64, 64)).save(dataset.path / "a.png")
    return dataset


def data(tab: DatasetTab, **values: Any) -> dict[Any, Any]:
    """What the page hands over: nothing is typed, and the Train page is as it starts."""
    usual: dict[str, Any] = {"view": FIRST_PAGE, "search": "", "selected": [], "opened": "", "shown": None, "bin": []}
    form = {component: tab.train.fields[name].default for name, component in tab.train.form.items()}
    return {**form, **{tab.parts[name]: value for name, value in {**usual, **values}.items()}}


def test_a_list_of_datasets_that_is_only_left_clears_nothing(tab: DatasetTab, cats: Dataset) -> None:
    chosen = dataset_sets.choose(tab, data(tab, list="cats"))
    assert chosen[tab.parts["selected"]] == []
    assert chosen[tab.parts["shown"]] == "cats"
    assert dataset_sets.choose(tab, data(tab, list="cats", shown="cats", selected=["a.png"])) == NOTHING
    assert dataset_sets.choose(tab, data(tab, list="cats", shown="dogs"))[tab.parts["shown"]] == "cats"


@pytest.mark.parametrize(
    ("lines", "is_said"),
    [
        ("masked_loss = true", True),
        ("seed = 1\n  masked_loss=false", True),
        ("masked_loss_normalize = true", False),
        ("# masked_loss = true", False),
        (None, False),
    ],
)
def test_only_masked_loss_itself_counts_as_said(lines: str | None, is_said: bool) -> None:
    assert says_masked_loss(lines) is is_said


def test_a_change_that_cannot_be_taken_back_is_an_error_on_the_page(
    tab: DatasetTab, cats: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset_history, "undo", full)
    monkeypatch.setattr(dataset_history, "restore", full)
    for work in (dataset_edits.undo, dataset_edits.restore):
        with pytest.raises(gr.Error, match="No space left"):
            work(tab, data(tab, list=cats.name, bin=["20260101-000000/a.png"]))


def test_training_gets_what_is_set_and_nothing_else(cats: Dataset) -> None:
    assert values_of_dataset(cats, "seed = 1") == {"image_dir": str(cats.path)}
    set_folder_repeats(cats, 4)
    add_white_masks(cats)
    assert values_of_dataset(cats, "seed = 1") == {
        "image_dir": str(cats.path),
        "num_repeats": 4,
        "more_options": "seed = 1\nmasked_loss = true",
    }


def test_closing_twice_gives_updates_of_components_only(tab: DatasetTab, cats: Dataset) -> None:
    for opened in ("a.png", ""):
        updates = dataset_edits.close(tab, data(tab, list=cats.name, opened=opened, caption="a cat"))
        assert set(updates) <= set(tab.outputs)
    assert (cats.path / "a.txt").read_text(encoding="utf-8") == "a cat"
