"""What the Presets page's handlers answer, without a browser."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest

from fluxgui.presets_tab import fill_from, no_longer_so
from fluxgui.train_layout import build_train_tab
from trainer.schema.presets import load_preset, save_preset


def test_an_exported_text_is_cleared_only_once_it_was_made_as_something_else() -> None:
    skip = gr.skip()
    assert no_longer_so("form", "bash", ["form", "bash"]) == (skip, skip)
    assert no_longer_so("form", "toml", ["form", "bash"]) == ("", None)


def test_presets_of_both_kinds_fill_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path))
    with gr.Blocks():
        train = build_train_tab(None)
    card = load_preset("vram-12")
    filled = fill_from(train, card)
    assert filled[train.form["blocks_to_swap"]]["value"] == str(card.values["blocks_to_swap"])
    assert filled[train.parts["vram_gb"]]["value"] == 12
    assert train.form["output_name"] not in filled
    own = fill_from(train, save_preset("mine", {"network_dim": 48}))
    assert own[train.form["network_dim"]]["value"] == "48"
    assert own[train.form["network_alpha"]]["value"] in (None, ""), "what was empty when it was saved is emptied"
