"""The parts of the Train page as HTML. Pure text out; everything that came from outside is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from fluxgui.form import Reading, missing_text
from fluxgui.pictures import PictureFolder
from trainer.schema.memory import Estimate, usable_bytes
from trainer.schema.memory_phases import Phase

NAMES_SHOWN: Final = 5
ESTIMATE_IS_OLD: Final = (
    '<div class="box warn" role="status">Settings have changed since this estimate. Press the button again.</div>'
)
COLOURS: Final = ("#6366f1", "#0ea5e9", "#10b981", "#f59e0b", "#ef4444", "#a855f7", "#64748b", "#14b8a6")


def title(heading: str, text: str = "") -> str:
    return f'<div class="card-title"><h2>{escape(heading)}</h2>{f"<p>{escape(text)}</p>" if text else ""}</div>'


def problems(reading: Reading, labels: Mapping[str, str]) -> str:
    """What stands between the form and Start, each a link to its field; or that it is ready."""
    parts: list[str] = []
    if reading.problems:
        items = "".join(
            f"<li>{_link(problem.field, labels)}{escape(problem.what.rstrip('.'))}."
            f"{_small(problem.where) if problem.field is None else ''}{_small(problem.hint)}</li>"
            for problem in reading.problems
        )
        parts.append(f'<div class="box bad"><strong>To correct</strong><ul>{items}</ul></div>')
    if reading.missing:
        items = "".join(
            f'<li><a href="#field-{name}">{escape(missing_text(name))}</a></li>' for name in reading.missing
        )
        parts.append(f'<div class="box warn"><strong>Still needed</strong><ul>{items}</ul></div>')
    if not parts:
        parts.append('<div class="box good"><strong>Ready to start.</strong></div>')
    if reading.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in reading.notes)
        parts.append(
            f'<details class="notes"><summary>Notes ({len(reading.notes)})</summary><ul>{items}</ul></details>'
        )
    return f'<div class="problems">{"".join(parts)}</div>'


def _link(field: str | None, labels: Mapping[str, str]) -> str:
    if field is None or field not in labels:
        return ""
    return f'<a href="#field-{escape(field)}">{escape(labels[field])}</a>: '


def _small(text: str | None) -> str:
    return f" <small>{escape(text)}</small>" if text else ""


def length(reading: Reading, *, num_repeats: int) -> str:
    """How many steps the run has, as far as the form tells: buckets may add a few."""
    if reading.options is None or reading.pictures is None:
        return ""
    options, num_images = reading.options, len(reading.pictures.images)
    per_epoch = -(-num_images * num_repeats // max(options.train_batch_size * options.gradient_accumulation_steps, 1))
    text = f"{num_images} pictures x {num_repeats} = about {per_epoch} steps an epoch"
    if options.max_train_epochs:
        text += f"; {options.max_train_epochs} epochs = about {per_epoch * options.max_train_epochs} steps"
    else:
        epochs = options.max_train_steps / per_epoch
        text += f"; {options.max_train_steps} steps = about {epochs:.1f} epochs"
    return f'<p class="empty">{escape(text)}.</p>'


def pictures(folder: PictureFolder, thumbnails: Sequence[tuple[str, bytes]], broken: Sequence[str]) -> str:
    """Count, captions, what is wrong, and the first pictures."""
    num_images, num_missing = len(folder.images), len(folder.without_caption)
    captions = "all with captions" if not num_missing else f"{num_images - num_missing} with captions"
    parts = [f"<p><strong>{num_images} pictures</strong>, {captions}.</p>"]
    if broken:
        items = "".join(f"<li>{escape(line)}</li>" for line in broken[:NAMES_SHOWN])
        more = f"<li>and {len(broken) - NAMES_SHOWN} more</li>" if len(broken) > NAMES_SHOWN else ""
        parts.append(f'<div class="box bad"><strong>Replace or remove</strong><ul>{items}{more}</ul></div>')
    if num_missing:
        names = ", ".join(path.name for path in folder.without_caption[:NAMES_SHOWN])
        more = f" and {num_missing - NAMES_SHOWN} more" if num_missing > NAMES_SHOWN else ""
        parts.append(
            f'<div class="box warn"><strong>{num_missing} without a caption</strong><p>{escape(names)}{more}. '
            "They are trained with the trigger word, or with an empty caption when there is none.</p></div>"
        )
    images = "".join(
        f'<img src="data:image/webp;base64,{base64.b64encode(data).decode()}" alt="{escape(name)}" title="{escape(name)}">'
        for name, data in thumbnails
    )
    return f'{"".join(parts)}<div class="thumbs">{images}</div>'


def upload(num_images: int, num_captions: int, folder: str, refused: Sequence[str]) -> str:
    text = f"{num_images} pictures and {num_captions} captions are in {folder}."
    parts = [f'<p role="status">{escape(text)}</p>']
    if refused:
        items = "".join(f"<li>{escape(line)}</li>" for line in refused[: 2 * NAMES_SHOWN])
        more = f"<li>and {len(refused) - 2 * NAMES_SHOWN} more</li>" if len(refused) > 2 * NAMES_SHOWN else ""
        parts.append(f'<div class="box warn"><strong>Left out</strong><ul>{items}{more}</ul></div>')
    return "".join(parts)


def cannot_estimate(reason: str) -> str:
    return f'<div class="box warn" role="status">{escape(reason)}</div>'


def estimate(result: Estimate, *, vram_bytes: int, host_bytes: int) -> str:
    """The parts of the peak as a bar and a table, the other phases in a line each, and whether it fits."""
    peak = max(result.phases, key=lambda phase: phase.peak_bytes)
    kind = "good" if result.fits else "bad"
    verdict = (
        f"{'Fits' if result.fits else 'Does not fit'} with blocks_to_swap = {result.blocks_to_swap}: "
        f"peak {_gib(result.peak_bytes)} of {_gib(vram_bytes)}, of which {_gib(usable_bytes(vram_bytes))} may be used."
    )
    reason = f"<p>{escape(result.reason)}</p>" if result.reason else ""
    parts = [f'<div class="box {kind}" role="status"><strong>{escape(verdict)}</strong>{reason}</div>']
    parts.append(f"<p>At the peak, {escape(peak.name)}:</p>")
    parts.append(_memory_bar(peak, max(vram_bytes, result.peak_bytes)))
    if result.blocks_to_swap and kind == "good":
        parts.append('<p class="empty">Swapped blocks wait in the host\'s memory; each step takes longer for it.</p>')
    if result.text_on_host:
        parts.append(
            '<p class="empty">The text encoders are too large for the card: captions are encoded by the CPU.</p>'
        )
    parts.append('<p class="empty">This is arithmetic with a reserve, not a measurement.</p>')
    others = "".join(
        f"<tr><td>{escape(phase.name)}</td><td>{_gib(phase.peak_bytes)}</td></tr>" for phase in result.phases
    )
    parts.append(f"<details><summary>Peak of each phase</summary><table>{others}</table></details>")
    host = f"Host memory: about {_gib(result.host_peak_bytes)} of {_gib(host_bytes)}"
    if result.host_peak_bytes > host_bytes:
        host += ", which is too little"
    parts.append(f"<p>{escape(host)}.</p>")
    return f'<div class="memory">{"".join(parts)}</div>'


def _memory_bar(phase: Phase, scale_bytes: int) -> str:
    shown = sorted((part for part in phase.parts if part.bytes > 0), key=lambda part: -part.bytes)
    coloured = [(part, COLOURS[index % len(COLOURS)]) for index, part in enumerate(shown)]
    bar = "".join(
        f'<div style="width:{100 * part.bytes / scale_bytes:.2f}%;background:{colour}" '
        f'title="{escape(part.name)}: {_gib(part.bytes)}"></div>'
        for part, colour in coloured
    )
    rows = "".join(
        f'<tr><td><span class="swatch" style="background:{colour}"></span>{escape(part.name)}</td>'
        f"<td>{_gib(part.bytes)}</td></tr>"
        for part, colour in coloured
    )
    return (
        f'<div class="memory-bar" role="img" aria-label="Memory at the peak, {escape(phase.name)}">{bar}</div>'
        f"<table><tbody>{rows}</tbody></table>"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
