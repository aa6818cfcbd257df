"""The length of training follows the pictures until it is set by hand."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from fluxgui import train_view
from fluxgui.dataset_extras import REPEATS_FILE
from fluxgui.fields import make_fields
from fluxgui.form import read_form
from fluxgui.presets_bar import card_preset
from fluxgui.train_layout import build_train_tab
from fluxgui.train_length import LENGTHS, NAMES, follow, length_values
from fluxgui.vram import Gpu
from trainer.schema.presets import load_preset


def values(**changes: str) -> dict[str, object]:
    start = dict.fromkeys(NAMES, "") | {"max_train_epochs": "10", "max_train_steps": "1600"}
    return {**start, "num_repeats": "10", "train_batch_size": "1", "gradient_accumulation_steps": "1", **changes}


@pytest.mark.parametrize(("pictures", "repeats"), [(1, 1), (10, 10), (30, 10), (100, 4), (3, 7)])
def test_a_longer_answer_has_more_epochs(pictures: int, repeats: int) -> None:
    epochs = [
        int(
            length_values(length, num_pictures=pictures, num_draws=pictures, num_repeats=repeats, batch_size=1)[
                "max_train_epochs"
            ]
        )
        for length in LENGTHS
    ]
    assert epochs == sorted(set(epochs))
    assert 900 <= epochs[1] * pictures * repeats <= 3200


def test_what_is_shorter_than_an_epoch_is_counted_in_steps() -> None:
    found = length_values("short", num_pictures=1000, num_draws=1000, num_repeats=10, batch_size=4)
    assert (found["max_train_epochs"], found["max_train_steps"]) == ("", "375")
    assert found["save_every_n_steps"] == "75"


def test_the_answer_follows_the_pictures() -> None:
    _, filled, changes = follow("normal", values(), None, num_pictures=0, num_draws=0)
    assert changes == {}
    length, filled, changes = follow("normal", values(), filled, num_pictures=5, num_draws=5)
    assert (length, changes["max_train_epochs"]) == ("normal", "20")
    now = values(**{name: str(text) for name, text in changes.items()})
    assert follow("normal", now, filled, num_pictures=5, num_draws=5) == ("normal", filled, {})
    assert follow("normal", now, filled, num_pictures=10, num_draws=10)[2]["max_train_epochs"] == "10"


def test_repeats_of_single_pictures_count(tmp_path: Path) -> None:
    """Three pictures of which one is drawn six times: eight draws."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    form = {**{name: field.default for name, field in make_fields().items()}, "image_dir": str(tmp_path)}
    form |= {"num_repeats": 2, "max_train_epochs": 5, "train_batch_size": 1}
    assert train_view.num_steps(read_form(form), num_repeats=2) == (6, 30)
    (tmp_path / REPEATS_FILE).write_text('{"pictures": {"a.png": 6, "gone.png": 9}}', encoding="utf-8")
    reading = read_form(form)
    assert train_view.num_steps(reading, num_repeats=2) == (16, 80)
    assert "3 pictures, drawn 8 times" in train_view.length(reading, num_repeats=2)
    found = length_values("normal", num_pictures=3, num_draws=8, num_repeats=2, batch_size=1)
    assert found["max_train_epochs"] == str(round(1000 / 16))


def test_a_total_set_by_hand_wins_and_an_interval_set_by_hand_stays() -> None:
    _, filled, _ = follow("normal", values(), None, num_pictures=0, num_draws=0)
    assert follow("normal", values(max_train_epochs="500"), filled, num_pictures=5, num_draws=5) == (None, {}, {})
    length, _, changes = follow("normal", values(save_every_n_epochs="3"), filled, num_pictures=5, num_draws=5)
    assert length == "normal"
    assert "save_every_n_epochs" not in changes
    assert follow(None, values(), None, num_pictures=5, num_draws=5) == (None, {}, {})


@pytest.mark.parametrize(("gigabytes", "name"), [(24.0, "vram-24"), (11.7, "vram-12"), (22.5, "vram-16"), (2.0, None)])
def test_a_card_gets_the_preset_that_is_not_too_large(gigabytes: float, name: str | None) -> None:
    found = card_preset(gigabytes)
    assert (found.name if found is not None else None) == name


def test_a_detected_card_is_chosen_on_the_first_visit_and_what_was_left_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path))
    with gr.Blocks():
        tab = build_train_tab(Gpu("A card", 12 * 2**30))
    card = load_preset("vram-12").values
    first = tab.arrive(None)
    assert first[tab.presets.card] == "vram-12"
    assert first[tab.presets.purpose] == "character"
    assert first[tab.form["blocks_to_swap"]]["value"] == str(card["blocks_to_swap"])
    assert first[tab.form["base_storage"]]["value"] == card["base_storage"]
    assert first[tab.form["resolution"]]["value"] == "512", "the card does not make the pictures larger"
    beside = {"length": "long", "filled": {}, "purpose": "style", "card": None, "vram_gb": 8, "ram_gb": 16}
    again = tab.arrive({"network_dim": "48", "beside the form": beside})
    assert again[tab.form["network_dim"]]["value"] == "48"
    assert (again[tab.presets.purpose], again[tab.parts["length_choice"]]) == ("style", "long")
    assert again[tab.parts["vram_gb"]] == 8
    assert tab.form["blocks_to_swap"] not in again
