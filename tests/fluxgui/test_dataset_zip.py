"""Datasets as zip files: what goes out comes in again, and what is hostile stays out."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from fluxgui import dataset_zip
from fluxgui.dataset_zip import add_files, write_zip
from fluxgui.datasets import Dataset, create_dataset, read_items


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "data"))
    return create_dataset("cats")


def png(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def packed(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_a_zip_file_holds_the_dataset(cats: Dataset, tmp_path: Path) -> None:
    (cats.path / "a.png").write_bytes(png(9))
    (cats.path / "a.txt").write_text("a cat", encoding="utf-8")
    (cats.path / "b.png").write_bytes(png(8))
    (cats.path / "notes.md").write_text("no part of it", encoding="utf-8")
    assert write_zip(cats, tmp_path / "out.zip") == 3
    other = create_dataset("other")
    added = add_files(other, [tmp_path / "out.zip"])
    assert (added.images, added.num_captions, added.refused) == (("a.png", "b.png"), 1, ())
    assert read_items(other) == read_items(cats)


def test_captions_stay_with_the_pictures_of_their_folder(cats: Dataset, tmp_path: Path) -> None:
    entries = {"x/1.png": png(1), "x/1.txt": b"one", "y/1.png": png(2), "y/1.txt": b"two", "__MACOSX/x/1.png": b""}
    added = add_files(cats, [packed(tmp_path / "two.zip", entries)])
    assert added.refused == ()
    assert {item.name: item.caption for item in read_items(cats)} == {"1.png": "one", "1-2.png": "two"}


def test_names_lead_nowhere_and_other_files_stay_out(cats: Dataset, tmp_path: Path) -> None:
    entries = {"../../evil.png": png(1), "/etc/a.png": png(2), "..\\b.png": png(3), "run.sh": b"#!", "bad.png": b"bad"}
    added = add_files(cats, [packed(tmp_path / "evil.zip", entries)])
    assert sorted(added.images) == ["a.png", "b.png", "evil.png"]
    assert sorted(path.name for path in cats.path.iterdir()) == ["a.png", "b.png", "evil.png"]
    assert sorted(line.split(":")[0] for line in added.refused) == ["bad.png", "run.sh"]
    assert not list(tmp_path.rglob("evil.png"))[1:]


def test_limits_hold_while_unpacking(cats: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_zip, "MAX_ENTRY_BYTES", 1000)
    added = add_files(cats, [packed(tmp_path / "bomb.zip", {"a.png": png(1), "bomb.txt": b"0" * 1_000_000})])
    assert added.images == ("a.png",)
    assert "bomb.txt" in added.refused[0]


def test_a_broken_zip_file_is_named(cats: Dataset, tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    added = add_files(cats, [tmp_path / "broken.zip"])
    assert added.images == ()
    assert "broken.zip" in added.refused[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_zip_file_that_is_damaged_anywhere_is_named(cats: Dataset, tmp_path: Path, method: int) -> None:
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", png(7))
    whole = path.read_bytes()
    named = 0
    for at in range(whole.index(b"a.png") + 5, whole.rindex(b"PK\x01\x02"), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        added = add_files(cats, [path])
        # What comes after the data's end may be wrong without harm: then the picture is there, byte for byte.
        assert [image.read_bytes() for image in cats.path.glob("*.png")] == [png(7)] * len(added.images)
        assert len(added.images) + len(added.refused) == 1
        assert all("damaged.zip" in line for line in added.refused)
        named += len(added.refused)
        for image in cats.path.glob("*.png"):
            image.unlink()
    assert named > 3
