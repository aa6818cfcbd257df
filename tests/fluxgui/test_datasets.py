"""Dataset folders, captions and their undo: everything on disk, nothing of the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fluxgui import caption_rules, datasets
from fluxgui.dataset_history import (
    binned,
    change_captions,
    delete_pictures,
    next_undo,
    restore,
    undo,
    write_captions,
)
from fluxgui.datasets import Dataset, Item, add_folder, add_pictures, create_dataset, find_dataset, read_items
from fluxgui.thumbnails import thumbnail
from trainer.schema.base import UserError
from trainer.schema.settings import change_settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "data"
    monkeypatch.setenv("FLUXGUI_HOME", str(home))
    return home


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return path


@pytest.fixture
def cats() -> Dataset:
    dataset = create_dataset("cats")
    for name, caption in (("a", "red cat, grass"), ("b", "blue cat"), ("c", None)):
        picture(dataset.path / f"{name}.png")
        if caption is not None:
            (dataset.path / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return dataset


def captions(dataset: Dataset) -> dict[str, str | None]:
    return {item.name: item.caption for item in read_items(dataset)}


def test_folders_are_found_by_name_only(cats: Dataset, tmp_path: Path) -> None:
    assert find_dataset("cats") == cats
    for name in ("../data", "nothing", "", None):
        assert find_dataset(name) is None
    assert datasets.picture_path(cats, "a.png") == cats.path / "a.png"
    for name in ("../cats/a.png", "a.txt", "missing.png"):
        assert datasets.picture_path(cats, name) is None
    outside = picture(tmp_path / "elsewhere" / "secret.png")
    (cats.path / "link.png").symlink_to(outside)
    assert datasets.picture_path(cats, "link.png") is None


def test_a_folder_is_added_only_below_an_allowed_one(cats: Dataset, tmp_path: Path) -> None:
    folder = picture(tmp_path / "elsewhere" / "cats" / "x.png").parent
    with pytest.raises(UserError, match="may not be used"):
        add_folder(str(folder))
    link = cats.path / "link"
    link.symlink_to(folder)
    with pytest.raises(UserError, match="may not be used"):
        add_folder(str(link))
    change_settings(allowed_dirs=(tmp_path / "elsewhere",))
    added = add_folder(f'"{folder}"')
    assert added.name == "cats-2", "the name was in use"
    assert find_dataset("cats-2") == added
    assert add_folder(str(folder)) == added
    datasets.remove_folder(added)
    assert find_dataset("cats-2") is None
    assert (folder / "x.png").exists()
    with pytest.raises(UserError, match="no such folder"):
        add_folder(str(tmp_path / "elsewhere" / "typo"))


def test_names_of_new_datasets_are_made_safe_and_unique(cats: Dataset) -> None:
    assert create_dataset("../../etc/my cat!").path.parent == cats.path.parent
    with pytest.raises(UserError, match="already"):
        create_dataset("cats")
    with pytest.raises(UserError, match="no name"):
        create_dataset("  ")


def test_uploads_replace_nothing_and_keep_their_captions(cats: Dataset, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    new = picture(upload / "a.png", (64, 64))
    (upload / "a.txt").write_text("a green cat", encoding="utf-8")
    broken = upload / "d.png"
    broken.write_bytes(new.read_bytes()[:60])
    (upload / "c.txt").write_text("for the picture that is there", encoding="utf-8")
    (upload / "e.exe").write_bytes(b"MZ")
    files = [new, upload / "a.txt", broken, upload / "c.txt", upload / "e.exe"]
    added = add_pictures(cats, files)
    assert added.images == ("a-2.png",)
    assert added.num_captions == 2
    assert [line.split(":")[0] for line in added.refused] == ["d.png", "e.exe"]
    assert captions(cats) == {
        "a.png": "red cat, grass",
        "a-2.png": "a green cat",
        "b.png": "blue cat",
        "c.png": "for the picture that is there",
    }


def test_an_edit_is_undone_byte_by_byte(cats: Dataset) -> None:
    file = cats.path / "a.txt"
    file.write_bytes(b"caf\xe9, cat\r\n")  # Latin-1, which is no UTF-8
    assert write_captions(cats, {"a.png": "coffee, cat", "c.png": "new"}, "edit") == 2
    assert file.read_bytes() == b"coffee, cat"
    assert next_undo(cats) == "edit"
    undone = undo(cats)
    assert undone is not None
    assert undone.num_files == 2
    assert file.read_bytes() == b"caf\xe9, cat\r\n"
    assert not (cats.path / "c.txt").exists()
    assert next_undo(cats) is None
    assert undo(cats) is None


def test_an_equal_caption_is_no_change(cats: Dataset) -> None:
    assert write_captions(cats, {"a.png": " red cat, grass ", "c.png": ""}, "edit") == 0
    assert next_undo(cats) is None
    assert not (cats.path / "c.txt").exists()


def test_undo_leaves_alone_what_was_changed_since(cats: Dataset) -> None:
    change_captions(cats, read_items(cats)[:2], caption_rules.with_prefix("photo of"), "prefix")
    (cats.path / "a.txt").write_text("by another program", encoding="utf-8")
    undone = undo(cats)
    assert undone is not None
    assert undone.num_files == 1
    assert undone.left_alone[0].startswith("a.txt")
    assert captions(cats)["a.png"] == "by another program"
    assert captions(cats)["b.png"] == "blue cat"


def test_changes_are_undone_one_by_one_from_the_newest(cats: Dataset) -> None:
    before = captions(cats)
    change_captions(cats, read_items(cats), caption_rules.replacing("cat", "dog", is_regex=False), "replace")
    change_captions(cats, read_items(cats), caption_rules.with_trigger("zwx"), "trigger")
    assert captions(cats) == {"a.png": "zwx, red dog, grass", "b.png": "zwx, blue dog", "c.png": "zwx"}
    assert [undone.what for _ in range(2) if (undone := undo(cats))] == ["trigger", "replace"]
    assert captions(cats) == before


def test_a_picture_goes_to_the_bin_with_its_caption_and_comes_back(cats: Dataset) -> None:
    picture(cats.path / "b.jpg")  # shares the caption of b.png
    assert delete_pictures(cats, ["a.png", "b.png", "nothing.png"], "delete") == 2
    assert sorted(path.name for path in cats.path.iterdir()) == ["b.jpg", "b.txt", "c.png"]
    assert {entry.split("/")[1] for entry in binned(cats)} == {"a.png", "a.txt", "b.png"}
    undo(cats)
    assert captions(cats)["a.png"] == "red cat, grass"
    assert binned(cats) == []
    delete_pictures(cats, ["a.png"], "delete")
    picture(cats.path / "a.png")
    kept = restore(cats, [*binned(cats), "../../x"])
    assert kept == ["a.png"]
    assert captions(cats)["a.png"] == "red cat, grass"


def test_a_change_that_cannot_be_done_changes_nothing(cats: Dataset) -> None:
    before = captions(cats)
    with pytest.raises(UserError, match="not in the dataset"):
        write_captions(cats, {"a.png": "x", "gone.png": "y"}, "edit")
    with pytest.raises(UserError, match="64 kB"):
        write_captions(cats, {"a.png": "x" * 70_000}, "edit")
    assert captions(cats) == before
    assert next_undo(cats) is None


def test_a_damaged_entry_of_the_history_is_dropped(cats: Dataset, home: Path) -> None:
    write_captions(cats, {"a.png": "x"}, "one")
    (entry,) = (home / "dataset-history" / cats.key).glob("*.json")
    entry.write_text(json.dumps({"what": 1}), encoding="utf-8")
    assert next_undo(cats) is None
    assert undo(cats) is None


def test_rules() -> None:
    assert caption_rules.with_prefix("photo of")("a cat") == "photo of a cat"
    assert caption_rules.with_prefix("zwx,")("") == "zwx,"
    assert caption_rules.with_suffix(", blurry")("a cat") == "a cat, blurry"
    assert caption_rules.with_suffix("outside")("a cat") == "a cat outside"
    assert caption_rules.with_trigger("cat")("a black cat") == "a black cat"
    assert caption_rules.with_trigger("cat")("category") == "cat, category"
    assert caption_rules.replacing("a.b", "x", is_regex=False)("a.b acb") == "x acb"
    assert caption_rules.replacing(r"(\w+) cat", r"cat, \1", is_regex=True)("red cat") == "cat, red"
    with pytest.raises(UserError, match="regular expression"):
        caption_rules.replacing("(", "", is_regex=True)
    with pytest.raises(UserError, match="regular expression"):
        caption_rules.replacing("a", r"\2", is_regex=True)("a")
    with pytest.raises(UserError, match="too long"):
        caption_rules.replacing("(a|aa)+$", "", is_regex=True)("a" * 60 + "b")


def test_filters_and_tags() -> None:
    items = [Item("a.png", "Red cat, grass"), Item("b.png", "red, grass"), Item("c.png", None)]
    assert datasets.count_tags(items) == [("grass", 2), ("red", 1), ("Red cat", 1)]
    assert datasets.matching(items, search="RED") == items[:2]
    assert datasets.matching(items, tag="red") == [items[1]]
    assert datasets.matching(items, only_missing=True) == [items[2]]
    assert datasets.matching(items, search="c.png") == [items[2]]


def test_thumbnails_are_small_upright_and_made_once(cats: Dataset) -> None:
    path = cats.path / "turned.jpg"
    image = Image.new("RGB", (400, 200), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    made = thumbnail(path, "small")
    assert made is not None
    with Image.open(made) as small:
        assert (small.format, small.size) == ("WEBP", (128, 256))
    first = made.stat().st_mtime_ns
    assert thumbnail(path, "small") == made
    assert made.stat().st_mtime_ns == first
    picture(path, (300, 300))
    assert thumbnail(path, "small") != made
    path.write_bytes(b"no picture")
    assert thumbnail(path, "small") is None
