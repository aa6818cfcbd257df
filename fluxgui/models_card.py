"""The card of model files on the Settings page: which there are, and getting them from the hub."""

from __future__ import annotations

from html import escape
from typing import Any, Final

import gradio as gr
from gradio.blocks import Block

from fluxgui.form_parts import html_part
from fluxgui.language import say
from fluxgui.models import KINDS, cancel_download, list_models, remember_models, start_download
from fluxgui.train_tab import IN_ORDER, TrainTab
from trainer.schema.base import UserError
from trainer.schema.folders import models_dir
from trainer.schema.model_sources import FLUX_CHOICES, T5_CHOICES, Progress, needed_files, read_progress

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
POLL_SECONDS: Final = 1.0

Updates = dict[Block, Any]


def build_models_card(train: TrainTab, tabs: gr.Tabs, page: gr.Tab) -> None:
    """Call inside the page's tab, `page`, at whose visits the files are looked for anew."""
    with gr.Column(elem_classes="card", elem_id="models-card"):
        html_part(
            f'<div class="card-title"><h2>{escape(say("models.title"))}</h2><p>{escape(say("models.help"))}</p></div>'
        )
        with gr.Row():
            picks = {
                name: gr.Dropdown(
                    [],
                    value=None,
                    label=train.fields[name].label,
                    filterable=False,
                    min_width=260,
                    elem_id=f"models-{name}",
                )
                for name in KINDS
            }
        use = gr.Button(say("models.use"), size="sm", elem_id="models-use")
        with gr.Row(elem_classes="fields"):
            flux = gr.Dropdown(
                [(say(f"models.flux_{each}"), each) for each in FLUX_CHOICES],
                value=FLUX_CHOICES[0],
                label=say("models.flux"),
                filterable=False,
                elem_id="models-flux",
            )
            t5 = gr.Dropdown(
                [(say(f"models.t5_{each}"), each) for each in T5_CHOICES],
                value=T5_CHOICES[0],
                label=say("models.t5"),
                filterable=False,
                elem_id="models-t5",
            )
        with gr.Row():
            get = gr.Button(say("models.get"), size="sm", variant="primary", elem_id="models-get")
            cancel = gr.Button(say("models.cancel"), size="sm", visible=False, elem_id="models-cancel")
        shown = html_part(elem_id="models-progress")
    timer = gr.Timer(POLL_SECONDS, active=False)
    outputs: list[Block] = [*picks.values(), shown, cancel, get, timer]

    def look() -> Updates:
        """Progress alone while it runs; the lists when it has ended."""
        progress = read_progress()
        running = progress is not None and progress.state == "running"
        updates: Updates = {
            shown: show_progress(progress),
            cancel: gr.update(visible=running),
            get: gr.update(interactive=not running),
            timer: gr.update(active=running),
        }
        return updates if running else {**updates, **lists()}

    def lists() -> Updates:
        found = list_models()
        chosen: Updates = {}
        for name, pick in picks.items():
            files = [(f"{model.path.name}: {model.text}", str(model.path)) for model in found if model.field == name]
            chosen[pick] = gr.update(choices=files, value=files[0][1] if files else None)
        return chosen

    def begin(flux_choice: str, t5_choice: str) -> Updates:
        try:
            start_download(flux_choice, t5_choice)
        except (OSError, UserError) as error:
            raise gr.Error(say("models.not_started", reason=error), print_exception=False) from None
        return look()

    def end() -> Updates:
        cancel_download()
        return look()

    def take(*paths: str | None) -> Updates:
        chosen = {name: path for name, path in zip(KINDS, paths, strict=True) if path}
        if not chosen:
            raise gr.Error(say("models.none"), print_exception=False)
        remember_models(chosen)
        return {**train.fill(chosen), tabs: gr.update(selected="train")}

    page.select(look, None, outputs, **QUIETLY)
    timer.tick(look, None, outputs, trigger_mode="once", **QUIETLY)
    get.click(begin, [flux, t5], outputs, show_progress="minimal", concurrency_limit=1)
    cancel.click(end, None, outputs, show_progress="minimal")
    use.click(take, [*picks.values()], [*train.form.values(), tabs], **QUIETLY).success(
        train.check, train.inputs, train.outputs, **IN_ORDER
    )


def show_progress(progress: Progress | None) -> str:
    """A bar for each file, and in words how it stands."""
    if progress is None:
        size = sum(file.num_bytes for file in needed_files("dev", "fp16"))
        text = say("models.not_yet", size=_gb(size), folder=models_dir())
        return f'<p class="empty">{escape(text)}</p>'
    kind = {"completed": "good", "failed": "bad"}.get(progress.state, "info")
    more = " ".join(part for part in (progress.message, progress.hint) if part)
    words = say(f"models.{progress.state}")
    box = (
        f'<div class="box {kind}" role="status"><strong>{escape(words)}</strong>'
        f"{f'<p>{escape(more)}</p>' if more else ''}</div>"
    )
    rows = "".join(
        f"<div><p>{escape(file.name)}: {_gb(file.done)} / {_gb(file.total) if file.total else '?'}</p>"
        f'<div class="bar {"completed" if file.path else "running"}"><div style="width: '
        f'{100 * file.done / file.total if file.total else 0:.1f}%"></div></div></div>'
        for file in progress.files
    )
    return box + rows


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
