"""The captions of a folder of pictures, read from the files beside them, and what is odd about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainer.data.listing import Found, names, system_reason
from trainer.schema.base import Problem

_USUAL_ENDINGS: Final = (".txt", ".caption", ".TXT", ".CAPTION")


@dataclass(frozen=True)
class Caption:
    """`text` is None when no caption file was found."""

    text: str | None
    has_more_lines: bool = False
    is_empty_file: bool = False


def read_captions(subset: Found, problems: list[Problem]) -> tuple[Caption, ...]:
    if subset.captions is not None:
        return tuple(Caption(text) for text in subset.captions)
    captions: list[Caption] = []
    for path in subset.paths:
        file = _caption_file(path, subset.spec.caption_extension)
        try:
            captions.append(
                Caption(None) if file is None else _read_caption(file, all_lines=subset.spec.enable_wildcard)
            )
        except (UnicodeError, OSError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeError) else system_reason(error)
            hint = "Save it as UTF-8." if isinstance(error, UnicodeError) else None
            problems.append(Problem(f"{file}: the caption cannot be read ({reason})", hint=hint))
            captions.append(Caption(""))
    return tuple(captions)


def _caption_file(path: Path, extension: str) -> Path | None:
    """The file beside the picture with its stem; or without the four numbers that face detection appends to names."""
    extension = extension if extension.startswith(".") else f".{extension}"
    parts = path.stem.split("_")
    stems = [path.stem, "_".join(parts[:-4])] if len(parts) >= 5 else [path.stem]
    candidates = (path.with_name(stem + extension) for stem in stems)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_caption(file: Path, *, all_lines: bool) -> Caption:
    """The first line without spaces around it, or `all_lines` that are not blank, of which wildcards draw one.

    A file without any line, an error in the reference, is an empty one.
    """
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    if not any(line.strip() for line in lines):
        return Caption("", is_empty_file=True)
    if all_lines:
        return Caption("\n".join(line.strip() for line in lines if line.strip()))
    return Caption(lines[0].strip(), has_more_lines=any(line.strip() for line in lines[1:]))


def missing_captions(subset: Found, captions: Sequence[Caption]) -> list[Path]:
    return [path for path, caption in zip(subset.paths, captions, strict=True) if caption.text is None]


def caption_warnings(
    found: Sequence[Found], captions: Mapping[Found, Sequence[Caption]], missing: Sequence[Path]
) -> list[str]:
    """One warning for each kind, with names."""
    warnings: list[str] = []
    pairs = [pair for subset in found for pair in zip(subset.paths, captions[subset], strict=True)]
    num_paths = len({path for path, _ in pairs})
    if missing:
        extensions = sorted({subset.spec.caption_extension for subset in found})
        text = (
            f"{len(missing)} of {num_paths} pictures have no caption file ({', '.join(extensions)}) and train with "
            f"their class tokens, or with an empty caption where there are none: {names([p.name for p in missing])}"
        )
        others = [
            path.with_suffix(end) for path in missing for end in _USUAL_ENDINGS if path.with_suffix(end).is_file()
        ]
        if others:
            text += f". There is {others[0].name}, for one: is caption_extension right?"
        warnings.append(text)
    empty = list(dict.fromkeys(path.name for path, caption in pairs if caption.is_empty_file))
    if empty:
        warnings.append(f"{len(empty)} caption files are empty: {names(empty)}")
    longer = list(dict.fromkeys(path.name for path, caption in pairs if caption.has_more_lines))
    if longer:
        warnings.append(f"{len(longer)} caption files have several lines; the first one is used: {names(longer)}")
    return warnings
