"""The parts of the Train page as HTML. Pure text out; everything that came from outside is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from fluxgui.form import Reading, missing_text
from fluxgui.language import say
from fluxgui.pictures import PictureFolder

NAMES_SHOWN: Final = 5
PURPOSES: Final = ("character", "style", "object", "concept", "quick-test")


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
        parts.append(f'<div class="box bad"><strong>{escape(say("train.to_correct"))}</strong><ul>{items}</ul></div>')
    if reading.missing:
        items = "".join(
            f'<li><a href="#field-{name}">{escape(missing_text(name))}</a></li>' for name in reading.missing
        )
        parts.append(
            f'<div class="box warn"><strong>{escape(say("train.still_needed"))}</strong><ul>{items}</ul></div>'
        )
    if not parts:
        parts.append(f'<div class="box good"><strong>{escape(say("train.ready"))}</strong></div>')
    if reading.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in reading.notes)
        parts.append(
            f'<details class="notes"><summary>{escape(say("train.notes", number=len(reading.notes)))}</summary>'
            f"<ul>{items}</ul></details>"
        )
    return f'<div class="problems">{"".join(parts)}</div>'


def _link(field: str | None, labels: Mapping[str, str]) -> str:
    if field is None or field not in labels:
        return ""
    return f'<a href="#field-{escape(field)}">{escape(labels[field])}</a>: '


def _small(text: str | None) -> str:
    return f" <small>{escape(text)}</small>" if text else ""


def num_steps(reading: Reading, *, num_repeats: int) -> tuple[int, int] | None:
    """Steps of an epoch and of the run, as far as the form tells: buckets may add a few. None while pictures are missing."""
    if reading.options is None or reading.pictures is None:
        return None
    options, num_draws = reading.options, reading.num_draws
    per_epoch = -(-num_draws * num_repeats // max(options.train_batch_size * options.gradient_accumulation_steps, 1))
    return per_epoch, options.max_train_epochs * per_epoch if options.max_train_epochs else options.max_train_steps


def length(reading: Reading, *, num_repeats: int) -> str:
    """How many steps the run has."""
    counted = num_steps(reading, num_repeats=num_repeats)
    if counted is None:
        return f'<p class="empty">{escape(say("train.length_waits"))}</p>' if reading.pictures is None else ""
    assert reading.options is not None
    assert reading.pictures is not None
    (per_epoch, total), epochs = counted, reading.options.max_train_epochs
    images = len(reading.pictures.images)
    drawn = say("train.drawn_pictures", images=images, draws=reading.num_draws)
    counted_images = say("train.num_pictures", number=images) if reading.num_draws == images else drawn
    parts = [say("train.steps_of_epoch", images=counted_images, repeats=num_repeats, steps=per_epoch)]
    if epochs:
        parts.append(say("train.steps_of_epochs", epochs=epochs, steps=total))
    else:
        parts.append(say("train.epochs_of_steps", epochs=f"{total / max(per_epoch, 1):.1f}", steps=total))
    return f'<p class="length">{escape("; ".join(parts))}.</p>'


def purpose(name: object) -> str:
    """What the purpose is for; nothing for none."""
    return f'<p class="empty">{escape(say(f"train.about_{name}"))}</p>' if name in PURPOSES else ""


def empty_state(name: str) -> str:
    """What to do while there is nothing yet."""
    return f'<div class="box note">{escape(say(f"train.{name}"))}</div>'


def pictures(folder: PictureFolder, thumbnails: Sequence[tuple[str, bytes]], broken: Sequence[str]) -> str:
    """Count, captions, what is wrong, and the first pictures."""
    num_images, num_missing = len(folder.images), len(folder.without_caption)
    captions = say("train.some_captions", number=num_images - num_missing) if num_missing else say("train.all_captions")
    counted = say("train.num_pictures", number=num_images)
    parts = [f"<p><strong>{escape(counted)}</strong>, {escape(captions)}.</p>"]
    if broken:
        items = "".join(f"<li>{escape(line)}</li>" for line in broken[:NAMES_SHOWN])
        more = _more(len(broken) - NAMES_SHOWN)
        head = escape(say("train.replace_or_remove"))
        parts.append(f'<div class="box bad"><strong>{head}</strong><ul>{items}{more}</ul></div>')
    if num_missing:
        names = ", ".join(path.name for path in folder.without_caption[:NAMES_SHOWN])
        if num_missing > NAMES_SHOWN:
            names += f", {say('train.and_more', number=num_missing - NAMES_SHOWN)}"
        parts.append(
            f'<div class="box warn"><strong>{escape(say("train.num_uncaptioned", number=num_missing))}</strong>'
            f"<p>{escape(names)}. {escape(say('train.uncaptioned'))}</p></div>"
        )
    images = "".join(
        f'<img src="data:image/webp;base64,{base64.b64encode(data).decode()}" alt="{escape(name)}" title="{escape(name)}">'
        for name, data in thumbnails
    )
    return f'{"".join(parts)}<div class="thumbs">{images}</div>'


def upload(num_images: int, num_captions: int, folder: str, refused: Sequence[str]) -> str:
    text = say("train.uploaded", images=num_images, captions=num_captions, folder=folder)
    parts = [f'<p role="status">{escape(text)}</p>']
    if refused:
        items = "".join(f"<li>{escape(line)}</li>" for line in refused[: 2 * NAMES_SHOWN])
        more = _more(len(refused) - 2 * NAMES_SHOWN)
        head = escape(say("train.left_out"))
        parts.append(f'<div class="box warn"><strong>{head}</strong><ul>{items}{more}</ul></div>')
    return "".join(parts)


def _more(number: int) -> str:
    return f"<li>{escape(say('train.and_more', number=number))}</li>" if number > 0 else ""
