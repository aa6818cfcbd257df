"""What the Dataset page's handlers answer, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from fluxgui import dataset_sets
from fluxgui.dataset_layout import build_dataset_tab
from fluxgui.dataset_tab import FIRST_PAGE, DatasetTab
from fluxgui.datasets import Dataset, create_dataset
from fluxgui.presets_tab import no_longer_so
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
    assert dataset_sets.choose(tab, data(tab, list="cats", shown="cats", selected=["a.png"])) == {}
    assert dataset_sets.choose(tab, data(tab, list="cats", shown="dogs"))[tab.parts["shown"]] == "cats"


def test_an_exported_text_is_cleared_only_once_it_was_made_as_something_else() -> None:
    skip = gr.skip()
    assert no_longer_so("form", "bash", ["form", "bash"]) == (skip, skip)
    assert no_longer_so("form", "toml", ["form", "bash"]) == ("", None)
