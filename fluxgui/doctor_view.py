"""What the check of a dataset found, as HTML: each finding with its fix beside it. What came from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from fluxgui.dataset_doctor import Crop, Finding, Kind, Report
from fluxgui.dataset_view import picture_url
from fluxgui.datasets import Dataset, Item
from fluxgui.language import say

ROWS_SHOWN: Final = 24
BAD: Final[frozenset[Kind]] = frozenset({"corrupt", "no_bucket"})
NOTES: Final[frozenset[Kind]] = frozenset({"transparent", "rotated", "long_clip"})
"""Good to know; nothing has to be done."""
WITH_CAPTION: Final[frozenset[Kind]] = frozenset({"missing", "long_t5", "long_clip"})
"""The fix of these is in the caption."""

SCRIPT: Final = """
element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.open) trigger("click", {name: button.dataset.open});
    if (button.dataset.remove) {
        button.closest("figure, li").classList.add("fixed");
        trigger("delete", {name: button.dataset.remove});
    }
});
element.addEventListener("change", (event) => {
    if (!event.target.matches("textarea[data-caption]")) return;
    event.target.closest("li").classList.toggle("fixed", event.target.value.trim() !== "");
    trigger("edit", {name: event.target.dataset.caption, text: event.target.value});
});
"""


def headings() -> dict[Kind, tuple[str, str]]:
    """What each kind of finding is called, and what to do about it."""
    return {
        "corrupt": (say("dataset.corrupt"), say("dataset.corrupt_fix")),
        "missing": (say("dataset.missing"), say("dataset.missing_fix")),
        "duplicate": (say("dataset.duplicate"), say("dataset.duplicate_fix")),
        "small": (say("dataset.small"), say("dataset.small_fix")),
        "cropped": (say("dataset.cropped"), say("dataset.cropped_fix")),
        "aspect": (say("dataset.aspect"), say("dataset.aspect_fix")),
        "no_bucket": (say("dataset.no_bucket"), say("dataset.no_bucket_fix")),
        "long_t5": (say("dataset.long_t5"), say("dataset.long_t5_fix")),
        "long_clip": (say("dataset.long_clip"), say("dataset.long_clip_fix")),
        "transparent": (say("dataset.transparent"), say("dataset.transparent_fix")),
        "rotated": (say("dataset.rotated"), say("dataset.rotated_fix")),
    }


def report(dataset: Dataset, found: Report, items: Mapping[str, Item]) -> str:
    """All findings by kind, each with what can be done about it on the spot."""
    words = headings()
    by_kind: dict[Kind, list[Finding]] = {}
    for finding in found.findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    if not by_kind:
        text = say("dataset.all_well", count=found.num_pictures)
        return f'<div class="box good" role="status"><strong>{escape(text)}</strong></div>'
    parts = [_kind(dataset, kind, findings, words[kind], items) for kind, findings in by_kind.items()]
    if found.is_estimate and ("long_t5" in by_kind or "long_clip" in by_kind):
        parts.append(f'<p class="empty">{escape(say("dataset.tokens_estimated"))}</p>')
    return f'<div class="doctor" role="status">{"".join(parts)}</div>'


def _kind(
    dataset: Dataset, kind: Kind, findings: Sequence[Finding], words: tuple[str, str], items: Mapping[str, Item]
) -> str:
    box = "bad" if kind in BAD else "note" if kind in NOTES else "warn"
    rows = "".join(_row(dataset, finding, items) for finding in findings[:ROWS_SHOWN])
    more = len(findings) - ROWS_SHOWN
    if more > 0:
        rows += f"<li>{escape(say('dataset.and_more', more=more))}</li>"
    # Notes are folded: they are long lists that keep nobody from training.
    is_open = "" if kind in NOTES else "open"
    return (
        f'<details class="box {box}" data-kind="{kind}" {is_open}><summary><strong>{escape(words[0])} '
        f"({len(findings)})</strong></summary><p>{escape(words[1])}</p><ul>{rows}</ul></details>"
    )


def _row(dataset: Dataset, finding: Finding, items: Mapping[str, Item]) -> str:
    figures = "".join(_figure(dataset, name) for name in finding.names)
    detail = f"<p>{escape(finding.detail)}</p>" if finding.detail else ""
    caption = ""
    if finding.kind in WITH_CAPTION:
        name = finding.names[0]
        text = escape((items[name].caption if name in items else None) or "")
        label = escape(say("dataset.caption_of", name=name))
        holder = escape(say("dataset.write_caption"))
        caption = f'<textarea data-caption="{escape(name)}" rows="2" aria-label="{label}" placeholder="{holder}">{text}</textarea>'
    return f'<li class="finding"><div class="figures">{figures}</div><div class="about">{detail}{caption}</div></li>'


def _figure(dataset: Dataset, name: str) -> str:
    shown = escape(name)
    open_label, delete_label = escape(say("dataset.open_one", name=name)), escape(say("dataset.delete_name", name=name))
    return (
        f'<figure><button type="button" data-open="{shown}" aria-label="{open_label}">'
        f'<img loading="lazy" alt="{shown}" src="{picture_url(dataset, name, "small")}"></button>'
        f'<figcaption><span title="{shown}">{shown}</span><button type="button" class="small" data-remove="{shown}" '
        f'aria-label="{delete_label}">{escape(say("dataset.delete_one"))}</button></figcaption></figure>'
    )


def buckets(found: Report) -> str:
    """How many pictures each training size has, as bars."""
    if not found.buckets:
        return ""
    most = max(count for _, count in found.buckets)
    rows = "".join(
        f"<tr><td>{width} x {height}</td><td><div class='count-bar' style='width:{100 * count / most:.0f}%'></div></td>"
        f"<td>{count}</td></tr>"
        for (width, height), count in found.buckets
    )
    return (
        f'<details class="buckets" open><summary>{escape(say("dataset.buckets", count=len(found.buckets)))}</summary>'
        f'<p class="empty">{escape(say("dataset.buckets_text"))}</p><table>{rows}</table></details>'
    )


def crop(kept: Crop | None) -> tuple[str, str]:
    """The frame of what training keeps, to lie on the picture, and a line that says it in words."""
    if kept is None:
        return "", ""
    style = (
        f"left:{100 * kept.left:.2f}%;top:{100 * kept.top:.2f}%;"
        f"width:{100 * kept.width:.2f}%;height:{100 * kept.height:.2f}%"
    )
    size = f"{kept.bucket[0]} x {kept.bucket[1]}"
    words = say("dataset.trained_as", size=size, percent=round(100 * kept.lost))
    return f'<div class="kept" style="{style}"></div>', f'<p class="empty" id="picture-crop">{escape(words)}</p>'


def progress(done: int, total: int) -> str:
    text = say("dataset.checking", done=done, total=total)
    width = 100 * done / max(1, total)
    return (
        f'<div class="bar" role="progressbar" aria-label="{escape(text)}" aria-valuenow="{width:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100"><div style="width:{width:.1f}%"></div></div><p>{escape(text)}</p>'
    )
