"""What may be wrong with a dataset's pictures and captions, and which training size each picture gets. No gradio.

Pictures are decoded whole, since a file can be damaged at its end. What was found out about a file is kept in memory for
as long as the file does not change.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, get_args

import dhash
import regex
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from fluxgui.datasets import Dataset, Item, read_items
from fluxgui.language import say
from fluxgui.pictures import DECODE_ERRORS, MAX_PIXELS, why_unreadable
from trainer.schema.buckets import Fit, Size, centre_crop, fitter
from trainer.schema.options_data import parse_resolution

HASH_SIDE: Final = 8
MAX_BITS: Final = 10
"""Bits of 128 in which the hashes of near-duplicates may differ."""
MAX_COLOUR: Final = 12.0
"""Mean difference, of 255, of the small pictures of near-duplicates; a hash knows no colours."""
EXTREME_ASPECT: Final = 2.5
MUCH_CROPPED: Final = 0.25
CLIP_TOKENS: Final = 77
T5_TOKENS: Final = 512
ORIENTATION: Final = 0x0112

Kind = Literal["corrupt", "missing", "duplicate", "small", "cropped", "aspect", "no_bucket", "long_t5", "long_clip", "transparent", "rotated"]  # fmt: skip
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""From what keeps a training from starting to what is only good to know."""


@dataclass(frozen=True)
class Facts:
    """What a picture file holds; `size` is upright. The rest is empty where it cannot be decoded, and `error` says why."""

    size: Size = (0, 0)
    error: str | None = None
    is_rotated: bool = False
    is_transparent: bool = False
    hash: int = 0
    colours: bytes = b""


@dataclass(frozen=True)
class Bucketing:
    """The settings that decide training sizes, as on the Train page."""

    resolution: Size
    enable_bucket: bool = True
    no_upscale: bool = False
    min_side: int = 256
    max_side: int = 1024
    step: int = 64

    def fit(self, size: Size) -> Fit:
        """The trainer's own arithmetic. Raises `ValueError` when no bucket fits."""
        return _fitter(self)(size)


@lru_cache(maxsize=8)
def _fitter(bucketing: Bucketing) -> Callable[[Size], Fit]:
    return fitter(
        bucketing.resolution,
        enable_bucket=bucketing.enable_bucket,
        no_upscale=bucketing.no_upscale,
        min_side=bucketing.min_side,
        max_side=bucketing.max_side,
        step=bucketing.step,
    )


@dataclass(frozen=True)
class Counts:
    """How many tokens a caption has. Estimates where no tokenizer file was given."""

    clip: Callable[[str], int]
    t5: Callable[[str], int]
    is_estimate: bool


@dataclass(frozen=True)
class Finding:
    """One thing that may be wrong. Several `names` are pictures that belong together."""

    kind: Kind
    names: tuple[str, ...]
    detail: str


@dataclass(frozen=True)
class Report:
    """All findings by kind, the number of pictures of each training size, and how many pictures were looked at."""

    findings: tuple[Finding, ...]
    buckets: tuple[tuple[Size, int], ...]
    num_pictures: int
    is_estimate: bool


@dataclass(frozen=True)
class Crop:
    """What a picture keeps, as fractions of its upright size, and its training size."""

    left: float
    top: float
    width: float
    height: float
    bucket: Size

    @property
    def lost(self) -> float:
        return 1 - self.width * self.height


def look_at(path: Path) -> Facts:
    """Decode one picture. Raises `OSError` when the file is gone."""
    facts = path.stat()
    return _look_at(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8192)
def _look_at(path: Path, _modified: int, _num_bytes: int) -> Facts:
    error = why_unreadable(path)
    if error is not None:
        return Facts(error=error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    return Facts(error=say("dataset.too_large"))
                is_rotated = image.getexif().get(ORIENTATION, 1) != 1
                is_transparent = _is_transparent(image)
                image.draft("RGB", (64, 64))
                upright = ImageOps.exif_transpose(image)
                size = _upright_size(path)
                small = _on_white(upright).resize((HASH_SIDE + 1, HASH_SIDE + 1), Image.Resampling.BOX)
    except DECODE_ERRORS as damage:
        return Facts(error=str(damage))
    row, column = dhash.dhash_row_col(list(small.convert("L").tobytes()), HASH_SIDE)
    return Facts(size, None, is_rotated, is_transparent, row << HASH_SIDE * HASH_SIDE | column, small.tobytes())


def _on_white(image: Image.Image) -> Image.Image:
    with_alpha = image.convert("RGBA")
    shown = Image.new("RGB", with_alpha.size, "white")
    shown.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return shown


def _is_transparent(image: Image.Image) -> bool:
    if "A" in image.getbands():
        lowest = image.getchannel("A").getextrema()[0]
        return isinstance(lowest, (int, float)) and lowest < 255
    return "transparency" in image.info


def _upright_size(path: Path) -> Size:
    with Image.open(path) as image:
        turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def bucketing_of(values: Mapping[str, object]) -> Bucketing | None:
    """From the form's values by name; None where they are none (yet)."""
    try:
        return Bucketing(
            parse_resolution(values["resolution"] or ""),
            enable_bucket=values["enable_bucket"] is True,
            no_upscale=values["bucket_no_upscale"] is True,
            min_side=max(16, int(str(values["min_bucket_reso"] or 256))),
            max_side=max(16, int(str(values["max_bucket_reso"] or 1024))),
        )
    except ValueError:
        return None


def crop_of(path: Path, bucketing: Bucketing) -> Crop | None:
    """What training keeps of a picture; None when it cannot be read or fits no bucket."""
    try:
        fit = bucketing.fit(_upright_size(path))
    except (ValueError, *DECODE_ERRORS):
        return None
    left, top = centre_crop(fit)
    return Crop(
        left / fit.resized[0],
        top / fit.resized[1],
        fit.bucket[0] / fit.resized[0],
        fit.bucket[1] / fit.resized[1],
        fit.bucket,
    )


def token_counts(clip_tokenizer: Path | None, t5_tokenizer: Path | None) -> Counts:
    """Counts by the tokenizers' files, where both are given as a folder with tokenizer.json; else by estimate."""
    clip, t5 = _tokenizer(clip_tokenizer), _tokenizer(t5_tokenizer)
    if clip is None or t5 is None:
        return Counts(estimate_tokens, estimate_tokens, is_estimate=True)
    return Counts(lambda text: len(clip.encode(text).ids), lambda text: len(t5.encode(text).ids), is_estimate=False)


def _tokenizer(folder: Path | None) -> Tokenizer | None:
    if folder is None:
        return None
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001 - the package raises nothing narrower
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def estimate_tokens(text: str) -> int:
    """About as many tokens as CLIP and T5 make: a piece of up to six letters each, every sign and ideograph by itself,
    and the marks of start and end."""
    words = regex.findall(r"\p{Han}|[\p{L}\p{M}]+|\p{N}+|[^\s\p{L}\p{M}\p{N}]", text)
    return 2 + sum(max(1, -(-len(word) // 6)) for word in words)


def examine(dataset: Dataset, bucketing: Bucketing | None, counts: Counts) -> Iterator[tuple[int, int] | Report]:
    """Look at all pictures. Gives (done, total) after each and the report at the end. Raises `OSError`."""
    items = read_items(dataset)
    findings: list[Finding] = []
    sizes: Counter[Size] = Counter()
    seen: dict[str, Facts] = {}
    for number, item in enumerate(items, 1):
        path = dataset.path / item.name
        try:
            facts = look_at(path)
        except FileNotFoundError:
            continue  # deleted meanwhile
        findings += _findings_of_caption(item, counts)
        if facts.error is not None:
            findings.append(Finding("corrupt", (item.name,), facts.error))
        else:
            seen[item.name] = facts
            findings += _findings_of_picture(item.name, facts, bucketing, sizes)
        yield number, len(items)
    findings += near_duplicates(seen)
    ordered = sorted(findings, key=lambda finding: KINDS.index(finding.kind))
    buckets = sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
    yield Report(tuple(ordered), tuple(buckets), len(items), counts.is_estimate)


def _findings_of_caption(item: Item, counts: Counts) -> Iterator[Finding]:
    if not item.caption:
        yield Finding("missing", (item.name,), "")
        return
    about = "≈ " if counts.is_estimate else ""
    if (num := counts.t5(item.caption)) > T5_TOKENS:
        yield Finding("long_t5", (item.name,), say("dataset.tokens", count=f"{about}{num}"))
    elif (num := counts.clip(item.caption)) > CLIP_TOKENS:
        yield Finding("long_clip", (item.name,), say("dataset.tokens", count=f"{about}{num}"))


def _findings_of_picture(
    name: str, facts: Facts, bucketing: Bucketing | None, sizes: Counter[Size]
) -> Iterator[Finding]:
    width, height = facts.size
    shape = f"{width} x {height}"
    if bucketing is not None:
        try:
            fit = bucketing.fit(facts.size)
        except ValueError as error:
            yield Finding("no_bucket", (name,), f"{shape}: {error}")
        else:
            sizes[fit.bucket] += 1
            bucket = f"{fit.bucket[0]} x {fit.bucket[1]}"
            if fit.resized[0] > width or fit.resized[1] > height:
                percent = math.ceil(100 * max(fit.resized[0] / width, fit.resized[1] / height))
                yield Finding("small", (name,), say("dataset.enlarged", size=shape, bucket=bucket, percent=percent))
            lost = 1 - fit.bucket[0] * fit.bucket[1] / (fit.resized[0] * fit.resized[1])
            if lost > MUCH_CROPPED:
                yield Finding("cropped", (name,), say("dataset.loses", percent=round(100 * lost), bucket=bucket))
    if max(width, height) > EXTREME_ASPECT * min(width, height):
        yield Finding("aspect", (name,), shape)
    if facts.is_transparent:
        yield Finding("transparent", (name,), "")
    if facts.is_rotated:
        yield Finding("rotated", (name,), "")


def near_duplicates(seen: Mapping[str, Facts]) -> list[Finding]:
    """Groups of pictures that look alike: their difference hashes (the dhash package) and their colours are close."""
    names = list(seen)
    group = dict(zip(names, names, strict=True))

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for index, first in enumerate(names):
        one = seen[first]
        for second in names[index + 1 :]:
            other = seen[second]
            if (one.hash ^ other.hash).bit_count() <= MAX_BITS and _difference(
                one.colours, other.colours
            ) <= MAX_COLOUR:
                group[root(second)] = root(first)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(root(name), []).append(name)
    return [Finding("duplicate", tuple(alike), "") for alike in groups.values() if len(alike) > 1]


def _difference(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(1, len(one))
