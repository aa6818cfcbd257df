"""A run to take away: everything in one zip, sent while it is made, and a report that is one HTML file. No gradio."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Final

from fluxgui.language import language, say
from fluxgui.loss_plot import draw_chart
from fluxgui.run_files_view import megabytes
from fluxgui.run_view import header, messages
from fluxgui.runs import RunView, read_log_tail
from fluxgui.theme import STYLE
from fluxgui.thumbnails import thumbnail

CHUNK_BYTES: Final = 1 << 20
LEFT_OUT: Final = frozenset({"state", "control", "worker.lock", "heartbeat.json", "process.json", "queue.json"})
"""What only serves to go on with the run: the state may take gigabytes."""
REPORT_STEPS: Final = 8
REPORT_SMOOTHING: Final = 0.9


def packed_files(folder: Path) -> list[Path]:
    """The run's files that belong into the zip, sorted; links that lead out of the folder are not followed."""
    root = folder.resolve()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in LEFT_OUT
        and not path.name.startswith(".")
        and path.is_file()
        and path.resolve().is_relative_to(root)
    )


def zip_stream(folder: Path) -> Iterator[bytes]:
    """A zip of the run as it is made, so that nothing of its size is kept in memory or on disk."""
    sink = _Sink()
    # Not compressed: LoRAs and pictures do not get smaller.
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # pyright: ignore[reportArgumentType] - only written
        for path in packed_files(folder):
            name = Path(folder.name, path.relative_to(folder)).as_posix()
            # zipfile refuses years before 1980, which a file may well have.
            info = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """Takes what is written until it is asked for; `zipfile` notes that it cannot go back in it."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] - bytes alone come
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


def report(view: RunView) -> str:
    """The run's page as one HTML file with its pictures inside, which needs nothing else to be looked at."""
    status, state = view.status, view.state
    chart = draw_chart(state, "loss", smoothing=REPORT_SMOOTHING)
    notes = f'<div class="card"><h2>{escape(say("runs.notes"))}</h2><pre>{escape(view.notes)}</pre></div>'
    saved = "".join(
        f"<li><b>{escape(Path(c.path).name)}</b> step {c.step}, {megabytes(c.num_bytes)}</li>"
        for c in state.checkpoints
    )
    cards = [
        header(view.name, status, state) + messages(status, state, read_log_tail(view.run)),
        f"<h2>{escape(say('runs.loss'))}</h2>{chart}",
        f"<h2>{escape(say('runs.samples'))}</h2>{_pictures(view)}",
        f"<h2>{escape(say('runs.downloads'))}</h2><ul>{saved}</ul>",
        *(
            f"<h2>{escape(path.name)}</h2><pre>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>"
            for path in (view.run.config_toml, view.run.dataset_toml, view.run.sample_prompts_txt)
            if path.is_file()
        ),
    ]
    body = "".join(f'<div class="card">{card}</div>' for card in cards)
    return (
        f'<!doctype html><html lang="{language()}"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(view.name)}</title><style>{_LOOK}{STYLE.read_text(encoding='utf-8')}</style>"
        f"<body>{body}{notes if view.notes else ''}</body></html>"
    )


# What the page's style takes from gradio's theme.
_LOOK: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 1rem auto; padding: 0 1rem; color: #18181b;
  --border-color-primary: #e4e4e7; --radius-lg: 8px; --radius-md: 6px; --background-fill-primary: #fff;
  --background-fill-secondary: #f4f4f5; --body-text-color-subdued: #52525b; --font-mono: ui-monospace, monospace;
  --primary-300: #a5b4fc; --primary-400: #818cf8; --primary-500: #6366f1; --primary-600: #4f46e5; }
.card { margin: 1rem 0; } .plot button { display: none; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def _pictures(view: RunView) -> str:
    ordered = sorted(view.state.samples, key=lambda sample: (-sample.step, sample.index))
    rows = [(step, list(row)) for step, row in groupby(ordered, key=lambda sample: sample.step)]
    if len(rows) > REPORT_STEPS:  # the first and the last ones tell how it went
        rows = [*rows[: REPORT_STEPS - 1], rows[-1]]
    parts: list[str] = []
    for step, row in rows:
        cells = "".join(
            f'<a><img alt="{escape(sample.prompt)}" src="data:image/webp;base64,{data}">'
            f"<span>{escape(sample.prompt)}</span></a>"
            for sample in row
            if (data := _inlined(view.run.path / sample.path))
        )
        parts.append(
            f'<section><h4>{escape(say("runs.at_step", step=step))}</h4><div class="row">{cells}</div></section>'
        )
    return f'<div class="samples">{"".join(parts)}</div>'


def _inlined(path: Path) -> str:
    try:
        kept = thumbnail(path, "small")
        return base64.b64encode(kept.read_bytes()).decode() if kept is not None else ""
    except OSError:
        return ""
