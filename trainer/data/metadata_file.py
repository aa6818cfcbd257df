"""Metadata files of fine-tuning datasets: pictures with their captions and tags, as JSON or one JSON object a line.

    {"a.png": {"caption": "a cat", "tags": "white, sitting"}}       .json
    {"image_path": "a.png", "caption": "a cat"}                     .jsonl, a line for each picture

Sizes that such a file may hold are not read: the pictures' own count.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import cast

from trainer.schema.base import Problem
from trainer.schema.dataset_keys import SubsetSpec

_SHOWN = 5


def read_metadata_file(subset: SubsetSpec, suffixes: Collection[str], problems: list[Problem]) -> dict[Path, str]:
    """Picture -> caption, in the file's order; pictures that are not there are problems.

    A relative path starts at `image_dir`, else at the current folder; the ending may be left off. The caption is
    followed by the tags, with `caption_separator` in between.
    """
    path = subset.metadata_file
    if path is None:
        raise AssertionError("the subset has a metadata file")
    captions: dict[Path, str] = {}
    missing: list[str] = []
    num_problems = len(problems)
    for name, entry, place in _entries(path, problems):
        texts = [entry.get("caption"), entry.get("tags")]
        if any(text is not None and not isinstance(text, str) for text in texts):
            problems.append(Problem("caption and tags must be text", f"{path}, {place}"))
            continue
        picture = _find(name, subset.image_dir, suffixes)
        if picture is None:
            missing.append(name)
        else:
            caption, tags = cast("list[str | None]", texts)
            captions[picture] = _combine(caption, tags, subset.caption_separator, keeps_lines=subset.enable_wildcard)
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        where = "this folder" if subset.image_dir is None else str(subset.image_dir)
        hint = f"Relative names start at {where}; image_dir says where."
        problems.append(Problem(f"{len(missing)} pictures do not exist: {shown}", str(path), hint))
    if not captions and len(problems) == num_problems:
        problems.append(Problem("the metadata file names no pictures", str(path)))
    return captions


def _combine(caption: str | None, tags: str | None, separator: str, *, keeps_lines: bool) -> str:
    """Caption and tags; behind each of several lines, of which wildcards draw one, where `keeps_lines` is set."""
    if not (caption and tags and keeps_lines):
        return separator.join(text for text in (caption, tags) if text)
    tags = tags.replace("\n", separator)
    return "\n".join(f"{line}{separator}{tags}" for line in caption.split("\n") if line.strip())


def _entries(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, object], str]]:
    """(name, values, place) of each picture."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        what = f"the metadata file cannot be read ({(error.strerror or str(error)).lower()})"
        problems.append(Problem(what, str(path), "Correct metadata_file."))
        return
    except UnicodeError:
        problems.append(Problem("the metadata file is not UTF-8 text", str(path), "Save it as UTF-8."))
        return
    if path.suffix.lower() == ".jsonl":
        yield from _entries_of_lines(text, path, problems)
        return
    try:
        parsed = cast("object", json.loads(text))
    except (ValueError, RecursionError) as error:
        problems.append(Problem(f"the metadata file is not JSON: {error}", str(path)))
        return
    if not isinstance(parsed, dict):
        hint = "Write it as {name: {caption: text}}, or as .jsonl."
        problems.append(Problem("the metadata file holds no object", str(path), hint))
        return
    for name, values in cast("dict[str, object]", parsed).items():
        if isinstance(values, dict):
            yield name, cast("dict[str, object]", values), name
        else:
            problems.append(Problem("a picture must have an object with a caption", f"{path}, {name}"))


def _entries_of_lines(text: str, path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, object], str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            parsed = cast("object", json.loads(line))
        except (ValueError, RecursionError) as error:
            problems.append(Problem(f"this line is not JSON: {error}", f"{path}, {place}"))
            continue
        values = cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}
        name = values.get("image_path")
        if isinstance(name, str) and name:
            yield name, values, place
        else:
            problems.append(Problem("this line has no image_path", f"{path}, {place}"))


def _find(name: str, folder: Path | None, suffixes: Collection[str]) -> Path | None:
    # Files that were written on Windows.
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        path = Path(spelling) if folder is None else folder / spelling
        if path.is_file():
            return path
        for suffix in sorted(suffixes):
            with_suffix = path.with_name(path.name + suffix) if path.name else path
            if with_suffix.is_file():
                return with_suffix
    return None
