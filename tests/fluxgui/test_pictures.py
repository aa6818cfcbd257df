"""Folders of pictures, and uploads into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fluxgui.datasets import take_in
from fluxgui.pictures import (
    PictureFolder,
    broken_pictures,
    check_folder,
    safe_name,
    thumbnails,
    upload_folder_name,
)
from trainer.schema.base import Problem
from trainer.schema.folders import datasets_dir


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    return tmp_path


def picture(path: Path, size: tuple[int, int] = (32, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def test_pictures_and_missing_captions_are_listed(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.png"):
        picture(tmp_path / "cats" / name)
    (tmp_path / "cats" / "b.txt").write_text("a cat")
    (tmp_path / "cats" / "notes.md").write_text("")
    folder = check_folder(tmp_path / "cats")
    assert isinstance(folder, PictureFolder)
    assert [path.name for path in folder.images] == ["a.JPG", "b.png"]
    assert [path.name for path in folder.without_caption] == ["a.JPG"]


def test_a_wrong_folder_is_a_problem_at_its_field(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "none", "does not exist"),
        (picture(tmp_path / "a.png"), "is a file"),
        (tmp_path / "empty", "no picture"),
    ):
        problem = check_folder(path)
        assert isinstance(problem, Problem)
        assert words in problem.what
        assert problem.field == "image_dir"


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:60])
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    lines = broken_pictures([good, cut, text])
    assert [line.partition(":")[0] for line in lines] == ["cut.png", "text.jpg"]
    assert [name for name, _ in thumbnails([good, cut, text])] == ["good.png"]


def test_uploads_are_checked_one_by_one_and_kept_under_safe_names(tmp_path: Path) -> None:
    broken = tmp_path / "up" / "broken.png"
    picture(tmp_path / "up" / "my cat (1).png")
    broken.write_bytes(b"x")
    (tmp_path / "up" / "my cat (1).txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "up" / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "up" / "run.exe").write_bytes(b"MZ")
    result = take_in(sorted((tmp_path / "up").iterdir()), "../../etc")
    assert result.folder.parent == datasets_dir()
    assert sorted(path.name for path in result.folder.iterdir()) == ["my_cat_1.png", "my_cat_1.txt"]
    assert (result.num_images, result.num_captions) == (1, 1)
    assert [line.partition(":")[0] for line in result.refused] == ["broken.png", "run.exe", "latin.txt"]


def test_an_upload_goes_to_our_folder_or_a_new_one_and_never_into_the_users() -> None:
    (datasets_dir() / "mycat").mkdir(parents=True)
    assert upload_folder_name(datasets_dir() / "mycat", "other") == "mycat"
    assert upload_folder_name(Path("/home/me/pictures"), "mycat") == "mycat-2"
    assert upload_folder_name(None, "dog") == "dog"


@pytest.mark.parametrize(("text", "name"), [("a b/c", "a_b_c"), ("..", "pictures"), ("", "pictures"), (".x", "x")])
def test_names_are_made_safe(text: str, name: str) -> None:
    assert safe_name(text) == name


def test_an_upload_replaces_nothing(tmp_path: Path) -> None:
    """Neither what was there before nor what comes with it under the same safe name."""
    old = picture(datasets_dir() / "cats" / "cat.png", (64, 64)).read_bytes()
    (datasets_dir() / "cats" / "cat.txt").write_text("my words", encoding="utf-8")
    files = [picture(tmp_path / folder / name) for folder, name in (("a", "cat.png"), ("b", "cat&.png"))]
    caption = tmp_path / "a" / "cat.txt"
    caption.write_text("other words", encoding="utf-8")
    result = take_in([*files, caption], "cats")
    assert (result.num_images, result.num_captions, result.refused) == (2, 1, ())
    kept = {path.name: path.read_bytes() for path in result.folder.iterdir()}
    assert set(kept) == {"cat.png", "cat.txt", "cat-2.png", "cat-2.txt", "cat-3.png"}
    assert (kept["cat.png"], kept["cat.txt"], kept["cat-2.txt"]) == (old, b"my words", b"other words")
    again = take_in([caption], "cats")
    assert [line.partition(":")[0] for line in again.refused] == ["cat.txt"], "it has a caption already"


def test_the_reason_why_a_picture_is_broken_names_no_path(tmp_path: Path) -> None:
    broken = tmp_path / "a.png"
    broken.write_bytes(b"no picture")
    cut = picture(tmp_path / "b.png", (300, 300))
    cut.write_bytes(cut.read_bytes()[:100])
    lines = broken_pictures([broken, cut])
    assert [line.split(":")[0] for line in lines] == ["a.png", "b.png"]
    assert str(tmp_path) not in "".join(lines)
    assert "damaged" in lines[0]
