"""The parts of the Dataset page as HTML. Pure text out; everything that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from typing import Final
from urllib.parse import quote

from fluxgui.dataset_extras import Extras
from fluxgui.datasets import Dataset, Item
from fluxgui.language import say

TAGS_SHOWN: Final = 60
LINES_SHOWN: Final = 10

# One listener for the whole grid: its cards come and go.
GRID_SCRIPT: Final = """
element.addEventListener("click", (event) => {
    const opener = event.target.closest("button[data-open]");
    if (opener) trigger("click", {name: opener.dataset.open});
});
element.addEventListener("change", (event) => {
    const box = event.target;
    if (box.matches("input[data-pick]")) trigger("select", {name: box.dataset.pick, on: box.checked});
    if (box.matches("textarea[data-caption]")) trigger("edit", {name: box.dataset.caption, text: box.value});
});
"""
TAGS_SCRIPT: Final = """
element.addEventListener("click", (event) => {
    const tag = event.target.closest("button[data-tag]");
    if (tag) trigger("click", {tag: tag.dataset.tag});
});
"""


def picture_url(dataset: Dataset, name: str, size: str, *, stamp: object = "") -> str:
    """The address of a picture in one of the sizes of `fluxgui.thumbnails`; `stamp` changes when the file does."""
    return f"/pictures/{quote(dataset.name, safe='')}/{size}/{quote(name, safe='')}?v={quote(str(stamp))}"


def mask_url(dataset: Dataset, name: str, size: str, *, stamp: object = "") -> str:
    """The address of the mask of the picture of that name."""
    return f"{picture_url(dataset, name, size, stamp=stamp)}&mask=1"


def grid(dataset: Dataset, items: Sequence[Item], selected: Collection[str], extras: Extras) -> str:
    """A card for each picture: tick, picture (opens it large) with its mask and repeats, name, caption to edit in place."""
    cards = "".join(_card(dataset, item, item.name in selected, extras) for item in items)
    return f'<div class="picture-grid">{cards}</div>'


def _card(dataset: Dataset, item: Item, is_selected: bool, extras: Extras) -> str:
    name = escape(item.name)
    missing = f'<span class="mark">{escape(say("dataset.no_caption_mark"))}</span>' if not item.caption else ""
    times = extras.repeats.of(item.name)
    often = f'<span class="often" title="{escape(say("dataset.repeated", times=times))}">×{times}</span>'
    return (
        f'<div class="picture-card" data-name="{name}">'
        f'<label class="pick"><input type="checkbox" data-pick="{name}" {"checked" if is_selected else ""} '
        f'aria-label="{escape(say("dataset.select_one", name=item.name))}"><span title="{name}">{name}</span></label>'
        f'<button type="button" data-open="{name}" aria-label="{escape(say("dataset.open_one", name=item.name))}">'
        f'<img loading="lazy" alt="{escape(item.caption or item.name)}" '
        f'src="{picture_url(dataset, item.name, "small", stamp=_stamp(dataset.path / item.name))}">'
        f"{_small_mask(dataset, item.name, extras)}{often if times > 1 else ''}</button>"
        f'<textarea data-caption="{name}" rows="3" spellcheck="false" '
        f'aria-label="{escape(say("dataset.caption_of", name=item.name))}" '
        f'placeholder="{escape(say("dataset.write_caption"))}">{escape(item.caption or "")}</textarea>{missing}</div>'
    )


def _small_mask(dataset: Dataset, name: str, extras: Extras) -> str:
    """The mask in a corner of its picture, in words for screen readers."""
    mask = extras.mask_of(name)
    if mask is None:
        return ""
    source = mask_url(dataset, name, "small", stamp=_stamp(mask))
    return f'<img class="mask" loading="lazy" alt="{escape(say("dataset.mask"))}" src="{source}">'


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def summary(dataset: Dataset, items: Sequence[Item]) -> str:
    """How many pictures and captions there are, and where."""
    missing = sum(not item.caption for item in items)
    text = say("dataset.count", pictures=len(items), captions=len(items) - missing)
    warning = f' <span class="mark">{escape(say("dataset.count_missing", missing=missing))}</span>' if missing else ""
    link = ""
    if items:
        address = f"/datasets/{quote(dataset.name, safe='')}/zip"
        link = f' · <a download id="dataset-zip" href="{address}">{escape(say("dataset.download_zip"))}</a>'
    place = f'<small class="where">{escape(str(dataset.path))}</small>'
    return f"<p><strong>{escape(text)}</strong>{warning}{link}<br>{place}</p>"


def tags(counts: Sequence[tuple[str, int]], chosen: str) -> str:
    """The most frequent tags, each a button that shows the pictures with it."""
    if not counts:
        return ""
    shown = [*counts[:TAGS_SHOWN], *((tag, count) for tag, count in counts[TAGS_SHOWN:] if tag == chosen)]
    buttons = "".join(
        f'<button type="button" class="tag" data-tag="{escape(tag)}" aria-pressed="{str(tag == chosen).lower()}">'
        f"{escape(tag)} <b>{count}</b></button>"
        for tag, count in shown
    )
    more = len(counts) - len(shown)
    rest = f'<span class="empty">{escape(say("dataset.more_tags", more=more))}</span>' if more > 0 else ""
    return f'<div class="tags" role="group" aria-label="{escape(say("dataset.tags"))}">{buttons}{rest}</div>'


def large(
    dataset: Dataset,
    name: str,
    position: int,
    num_shown: int,
    *,
    mask: Path | None = None,
    overlay: str = "",
    words: str = "",
) -> str:
    """One picture as large as there is room, its mask and `overlay` lying on it and `words` below, both HTML."""
    place = escape(say("dataset.place", position=position, count=num_shown))
    source = picture_url(dataset, name, "large", stamp=_stamp(dataset.path / name))
    over, told = "", ""
    if mask is not None:
        over = f'<img class="mask-over" alt="" src="{mask_url(dataset, name, "large", stamp=_stamp(mask))}">'
        told = f'<p id="picture-mask">{escape(say("dataset.mask_shown"))}</p>'
    return (
        f'<div class="large-picture"><p><strong>{escape(name)}</strong> <span class="empty">{place}</span></p>'
        f'<div class="stage"><img alt="{escape(name)}" src="{source}">{over}{overlay}</div>{told}{words}</div>'
    )


def masks_state(extras: Extras, names: Sequence[str]) -> str:
    """How many pictures have a mask, and what that means for training."""
    num = sum(extras.mask_of(name) is not None for name in names)
    if not num:
        text = say("dataset.masks_none")
    elif num < len(names):
        text = say("dataset.masks_some", count=num, all=len(names))
    else:
        text = say("dataset.masks_all", count=num)
    return f"<p>{escape(text)}</p>"


def preview(changes: Sequence[tuple[str, str, str]], num_looked_at: int) -> str:
    """What find and replace will do: how many captions, and the first ones before and after."""
    kind = "good" if changes else "warn"
    text = say("dataset.will_change", changed=len(changes), count=num_looked_at)
    rows = "".join(
        f"<li><span class='where'>{escape(name)}</span><br><del>{escape(before)}</del><br><ins>{escape(after)}</ins></li>"
        for name, before, after in changes[:3]
    )
    return f'<div class="box {kind}" role="status"><strong>{escape(text)}</strong><ul class="diff">{rows}</ul></div>'


def lines(kind: str, heading: str, entries: Sequence[str] = ()) -> str:
    """A box with a heading and a list, cut where it gets long; empty for no heading."""
    if not heading:
        return ""
    items = "".join(f"<li>{escape(entry)}</li>" for entry in entries[:LINES_SHOWN])
    if len(entries) > LINES_SHOWN:
        items += f"<li>{escape(say('dataset.and_more', more=len(entries) - LINES_SHOWN))}</li>"
    listed = f"<ul>{items}</ul>" if entries else ""
    return f'<div class="box {kind}" role="status"><strong>{escape(heading)}</strong>{listed}</div>'


def done(text: str) -> str:
    """The line that says what was just done; read out by screen readers."""
    return f'<p role="status" class="done">{escape(text)}</p>' if text else ""
