from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.specs import SUBSET, one_dataset, picture
from trainer.data.index import index_dataset
from trainer.schema.base import UserError
from trainer.schema.dataset_keys import SubsetSpec


def listed(folder: Path, content: object, *, name: str = "meta.json") -> SubsetSpec:
    """A subset of `images` in `folder`, with a metadata file of `content`; a list makes lines."""
    for number, file in enumerate(("a.png", "b.jpg", "deep/c.png")):
        picture(folder / "images" / file, seed=number)
    lines = [json.dumps(line) for line in content] if isinstance(content, list) else [json.dumps(content)]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return replace(SUBSET, image_dir=folder / "images", metadata_file=folder / name)


def captions_of(subset: SubsetSpec) -> dict[str, str]:
    return {item.path.name: item.caption for item in index_dataset(one_dataset(subset)).items}


def problems_of(subset: SubsetSpec) -> list[str]:
    with pytest.raises(UserError) as failure:
        index_dataset(one_dataset(subset))
    assert failure.value.exit_code == 3
    return [str(problem) for problem in failure.value.problems]


def test_captions_and_tags_are_joined_by_the_separator(tmp_path: Path) -> None:
    content = {
        "a.png": {"caption": "a cat", "tags": "white, small", "image_size": [1, 1]},
        "b": {"tags": "black"},
        "deep\\c.png": {"caption": "a dog", "tags": ""},
    }
    subset = listed(tmp_path, content)
    assert captions_of(subset) == {"a.png": "a cat,white, small", "b.jpg": "black", "c.png": "a dog"}
    with_bars = replace(subset, caption_separator="|")
    assert captions_of(with_bars)["a.png"] == "a cat|white, small"
    index = index_dataset(one_dataset(subset))
    assert {(item.width, item.height) for item in index.items} == {(64, 64)}, "sizes are the files' own"
    assert index.warnings == ()


def test_one_object_a_line_is_read_the_same(tmp_path: Path) -> None:
    lines = [{"image_path": str(tmp_path / "images" / "a.png"), "caption": "a cat"}, {"image_path": "b.jpg"}]
    subset = listed(tmp_path, lines, name="meta.jsonl")
    assert captions_of(subset) == {"a.png": "a cat", "b.jpg": ""}
    (tmp_path / "whole.jsonl").write_text((tmp_path / "meta.jsonl").read_text().splitlines()[0] + "\n\n")
    assert captions_of(replace(subset, image_dir=None, metadata_file=tmp_path / "whole.jsonl")) == {"a.png": "a cat"}


def test_caption_files_beside_listed_pictures_are_not_read(tmp_path: Path) -> None:
    subset = listed(tmp_path, {"a.png": {"caption": "from the list"}})
    (tmp_path / "images" / "a.txt").write_text("from the file")
    assert captions_of(subset) == {"a.png": "from the list"}


@pytest.mark.parametrize(
    ("text", "name", "problems"),
    [
        ("{", "meta.json", ["the metadata file is not JSON: Expecting property name"]),
        ("[1]", "meta.json", ["the metadata file holds no object"]),
        ("{}", "meta.json", ["the metadata file names no pictures"]),
        ('{"a.png": "a cat"}', "meta.json", ["a picture must have an object with a caption"]),
        ('{"a.png": {"caption": 3}}', "meta.json", ["caption and tags must be text"]),
        ('{"gone.png": {}, "lost": {}}', "meta.json", ["2 pictures do not exist: gone.png, lost ("]),
        ('{"image_path": "a.png"}\n{', "meta.jsonl", ["this line is not JSON"]),
        ('{"caption": "x"}\n[]', "meta.jsonl", ["this line has no image_path", "this line has no image_path"]),
        (None, "absent.json", ["the metadata file cannot be read (no such file or directory)"]),
    ],
)
def test_a_wrong_metadata_file_is_explained(tmp_path: Path, text: str | None, name: str, problems: list[str]) -> None:
    subset = replace(listed(tmp_path, {}), metadata_file=tmp_path / name)
    if text is not None:
        (tmp_path / name).write_text(text)
    found = problems_of(subset)
    assert len(found) == len(problems)
    for line, start in zip(found, problems, strict=True):
        assert line.startswith(start)
        assert str(tmp_path / name) in line


def test_of_a_picture_in_two_subsets_the_last_one_counts(tmp_path: Path) -> None:
    first = listed(tmp_path, {"a.png": {"caption": "one"}, "b.jpg": {"caption": "one"}})
    (tmp_path / "second.json").write_text(json.dumps({"a.png": {"caption": "two"}}))
    second = replace(first, metadata_file=tmp_path / "second.json", num_repeats=3)
    index = index_dataset(one_dataset(first, second))
    assert [(item.path.name, item.caption, item.num_repeats) for item in index.items] == [
        ("b.jpg", "one", 1),
        ("a.png", "two", 3),
    ]
    assert index.warnings == ("1 pictures are in several subsets of one dataset; the last one's is used",)
    assert (
        index_dataset(one_dataset(first, first))
        .warnings[0]
        .endswith("is given twice in one dataset; only the first one is used")
    )
