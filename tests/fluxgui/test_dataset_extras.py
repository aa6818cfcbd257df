"""Masks and repeats of a dataset: taken in, shown, undone, and what the trainer makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from PIL import Image

from fluxgui.dataset_extras import (
    REPEATS_FILE,
    add_masks,
    add_white_masks,
    delete_masks,
    mask_path,
    read_extras,
    read_masks,
    read_repeats,
    set_folder_repeats,
    set_repeats,
)
from fluxgui.dataset_history import binned, delete_pictures, next_undo, restore, undo
from fluxgui.datasets import Dataset, create_dataset, read_items
from fluxgui.fields import make_fields
from fluxgui.form import read_form
from trainer.data.index import index_dataset
from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.dataset_file import read_dataset_config

NAMES = ("a.png", "b.png", "c.png")


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "data"))
    dataset = create_dataset("cats")
    for number, name in enumerate(NAMES):
        Image.new("RGB", (64, 64), (60 * number, 40, 90)).save(dataset.path / name)
        (dataset.path / name).with_suffix(".txt").write_text("a cat", encoding="utf-8")
    return dataset


def mask(path: Path, grey: int = 200, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path


def mask_names(dataset: Dataset) -> dict[str, list[str]]:
    return {stem: [path.name for path in paths] for stem, paths in read_masks(dataset.path).items()}


def items(dataset: Dataset, *names: str) -> list[Any]:
    return [item for item in read_items(dataset) if item.name in names]


def test_masks_are_matched_checked_replaced_and_undone(cats: Dataset, tmp_path: Path) -> None:
    up = tmp_path / "up"
    (tmp_path / "up").mkdir()
    (up / "c.png").write_bytes(b"no picture")
    good = [mask(up / "a.png", 10), mask(up / "b_mask.webp", 20)]
    bad = [mask(up / "dog.png"), mask(up / "a-mask.png"), mask(up / "c_mask.png", size=(64, 32)), up / "c.png"]
    added = add_masks(cats, [*good, *bad])
    assert added.pictures == ("a.png", "b.png")
    assert [line.partition(":")[0] for line in added.refused] == ["dog.png", "a-mask.png", "c_mask.png", "c.png"]
    assert mask_names(cats) == {"a": ["a.png"], "b": ["b.webp"]}
    assert mask_path(cats, "a.png") == cats.path / "masks" / "a.png"
    assert mask_path(cats, "c.png") is None
    assert mask_path(cats, "../a.png") is None
    # Another one takes the place of the first, whatever its ending, and each step comes back.
    first = (cats.path / "masks" / "b.webp").read_bytes()
    add_masks(cats, [mask(tmp_path / "again" / "b.png", 30)])
    assert mask_names(cats)["b"] == ["b.png"]
    assert next_undo(cats) == "add 1 masks"
    assert undo(cats) is not None
    assert (cats.path / "masks" / "b.webp").read_bytes() == first
    assert add_white_masks(cats) == 1
    assert Image.open(read_masks(cats.path)["c"][0]).getextrema() == (255, 255)
    assert delete_masks(cats, items(cats, "a.png", "b.png")) == 2
    assert set(read_masks(cats.path)) == {"c"}
    for _ in range(2):
        undo(cats)
    assert set(read_masks(cats.path)) == {"a", "b"}
    # A mask that was painted on since is the user's own work.
    mask(cats.path / "masks" / "a.png", 99)
    undone = undo(cats)
    assert undone is not None
    assert len(undone.left_alone) == 1
    assert set(read_masks(cats.path)) == {"a"}


def test_all_masks_of_a_picture_make_room_and_come_back(cats: Dataset, tmp_path: Path) -> None:
    old = {name: mask(cats.path / "masks" / name, 10 + number) for number, name in enumerate(("a.jpg", "a.png"))}
    before = {name: path.read_bytes() for name, path in old.items()}
    assert mask_names(cats) == {"a": ["a.jpg", "a.png"]}
    add_masks(cats, [mask(tmp_path / "up" / "a.jpg", 250)])
    assert mask_names(cats) == {"a": ["a.jpg"]}
    assert old["a.jpg"].read_bytes() != before["a.jpg"]
    assert undo(cats) is not None
    assert {name: path.read_bytes() for name, path in old.items()} == before
    assert delete_masks(cats, items(cats, "a.png")) == 2


def test_nothing_is_written_moved_or_shown_through_a_link_out_of_the_allowed_folders(
    cats: Dataset, tmp_path: Path
) -> None:
    outside = mask(tmp_path / "elsewhere" / "a.png", 1).parent
    (cats.path / "masks").symlink_to(outside)
    before = (outside / "a.png").read_bytes()
    assert read_masks(cats.path) == {}
    for work in (
        lambda: add_masks(cats, [mask(tmp_path / "up" / "a.png")]),
        lambda: add_white_masks(cats),
        lambda: delete_masks(cats, items(cats, "a.png")),
    ):
        with pytest.raises(UserError, match="may not be used"):
            work()
    delete_pictures(cats, ["a.png"], "delete")
    assert [path.name for path in outside.iterdir()] == ["a.png"]
    assert (outside / "a.png").read_bytes() == before


def test_a_mask_goes_to_the_bin_and_back_with_its_picture(cats: Dataset, tmp_path: Path) -> None:
    add_masks(cats, [mask(tmp_path / "up" / "a.png")])
    delete_pictures(cats, ["a.png"], "delete")
    assert read_masks(cats.path) == {}
    mask_entry, entry = (entry for entry in binned(cats) if entry.endswith("/a.png"))
    assert mask_entry == entry.replace("/a.png", "/masks/a.png")
    assert restore(cats, [entry, mask_entry]) == []
    assert set(read_masks(cats.path)) == {"a"}


def test_a_mask_is_listed_in_the_bin_and_put_back_alone(cats: Dataset, tmp_path: Path) -> None:
    add_masks(cats, [mask(tmp_path / "up" / "a.png")])
    delete_masks(cats, items(cats, "a.png"))
    (entry,) = binned(cats)
    assert entry.endswith("/masks/a.png")
    mask(cats.path / "masks" / "a.webp")
    assert restore(cats, [entry]) == ["masks/a.png"], "two masks of a picture are a mistake"
    (cats.path / "masks" / "a.webp").unlink()
    assert restore(cats, [entry]) == []
    assert mask_names(cats) == {"a": ["a.png"]}
    assert binned(cats) == []


def test_repeats_are_set_kept_in_the_folder_and_undone(cats: Dataset) -> None:
    assert set_repeats(cats, items(cats, "a.png", "b.png"), 3) == 2
    assert set_repeats(cats, items(cats, "a.png", "b.png"), 3.0) == 0, "nothing new is no change"
    assert set_repeats(cats, items(cats, "b.png"), 1) == 1
    assert read_repeats(cats.path).folder is None, "repeats of pictures say nothing about the folder"
    assert set_folder_repeats(cats, 5)
    assert not set_folder_repeats(cats, 5)
    extras = read_extras(cats)
    assert (extras.repeats.folder, dict(extras.repeats.pictures)) == (5, {"a.png": 3})
    for wrong in (0, -1, 1.5, None, True, 1001, float("inf"), float("nan")):
        with pytest.raises(UserError, match="whole number"):
            set_repeats(cats, items(cats, "a.png"), wrong)
    for expected in ((None, {"a.png": 3}), (None, {"a.png": 3, "b.png": 3}), (None, {})):
        undo(cats)
        repeats = read_repeats(cats.path)
        assert (repeats.folder, dict(repeats.pictures)) == expected
    for damaged in ("", "[]", '{"pictures": 3}', '{"folder": "x"}', '{"folder": 1e999}', "[" * 100_000):
        (cats.path / REPEATS_FILE).write_text(damaged, encoding="utf-8")
        assert read_repeats(cats.path).folder is None


@pytest.fixture
def dataset_toml(cats: Dataset) -> Callable[..., str]:
    def read(**more: object) -> str:
        empty = {name: field.default for name, field in make_fields().items()}
        reading = read_form({**empty, "image_dir": str(cats.path), "resolution": "64", "num_repeats": 2, **more})
        assert {"image_dir"} & set(reading.problem_by_field) == set(), reading.problem_by_field
        return reading.dataset_toml

    return read


def test_what_was_set_is_what_the_trainer_draws(
    cats: Dataset, tmp_path: Path, dataset_toml: Callable[..., str]
) -> None:
    set_repeats(cats, items(cats, "a.png"), 3)
    add_masks(cats, [mask(tmp_path / "up" / "a.png", 0)])
    assert "conditioning_data_dir" not in dataset_toml()
    add_white_masks(cats)
    text = dataset_toml(more_options="masked_loss = true")
    (subset,) = tomlkit.parse(text).unwrap()["datasets"][0]["subsets"]
    assert subset["picture_repeats"] == {"a.png": 3}
    file = tmp_path / "dataset.toml"
    file.write_text(text, encoding="utf-8")
    index = index_dataset(read_dataset_config(file, parse_command_line(["--masked_loss"]).options))
    assert {item.path.name: item.num_repeats for item in index.items} == {"a.png": 6, "b.png": 2, "c.png": 2}
    assert index.datasets[0].num_train_images == 10
    assert {item.path.name: item.mask_file is not None and item.mask_file.is_black for item in index.items} == {
        "a.png": True,
        "b.png": False,
        "c.png": False,
    }


def test_a_missing_mask_is_named_before_the_start(cats: Dataset, tmp_path: Path) -> None:
    add_masks(cats, [mask(tmp_path / "up" / "a.png")])
    empty = {name: field.default for name, field in make_fields().items()}
    reading = read_form({**empty, "image_dir": str(cats.path), "more_options": "masked_loss = true"})
    assert "hese pictures have no mask: b.png, c.png" in reading.problem_by_field["image_dir"]
    add_white_masks(cats)
    mask(cats.path / "masks" / "a.jpg")
    reading = read_form({**empty, "image_dir": str(cats.path), "more_options": "masked_loss = true"})
    assert "several masks of one picture: a.jpg, a.png" in reading.problem_by_field["image_dir"]
