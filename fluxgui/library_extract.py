"""A LoRA of the difference of two models, on the Library page: start, progress, cancel. The work is a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gradio as gr
from gradio.blocks import Block

from fluxgui import library_view
from fluxgui.form_parts import PLAIN, html_part
from fluxgui.jobs import JobView, cancel_job, list_jobs, start_job
from fluxgui.language import say
from fluxgui.library import loras_dir
from fluxgui.library_tab import POLL_SECONDS, QUIETLY, LibraryTab, Updates, refused, whole
from fluxgui.pictures import safe_name
from trainer.schema.base import UserError
from trainer.schema.job_folder import JobFolder

EXTRACT: Final = "lora-extract"
USUAL_RANK: Final = "16"


def start_extract(original: str, tuned: str, *, rank: int | None, name: str) -> JobFolder:
    """Start the extraction; the LoRA lies in the library's folder. Raises `UserError` for what cannot be started."""
    files = [Path(text.strip().strip("\"'")).expanduser() for text in (original, tuned)]
    for file, label in zip(files, ("library.original", "library.tuned"), strict=True):
        if not file.is_file():
            raise UserError(
                say("library.no_model_file", label=say(label)), str(file), say("library.no_model_file_hint")
            )
    if rank is None:
        raise UserError(say("library.no_rank"))
    running = latest_extract()
    if running is not None and running.is_live:
        raise UserError(say("library.extract_busy"))
    stem = safe_name(name) if name.strip() else f"{files[1].stem}-extract"
    target = loras_dir() / f"{stem}.safetensors"
    if target.exists():
        raise UserError(say("library.name_taken"), target.name, say("library.name_taken_hint"))
    target.parent.mkdir(parents=True, exist_ok=True)
    words = ["extract", f"--model_org={files[0]}", f"--model_tuned={files[1]}", f"--dim={rank}", f"--save_to={target}"]
    return start_job(EXTRACT, f"extract: {stem}", [*words, "--job_dir={job}"])


def latest_extract() -> JobView | None:
    return next(iter(list_jobs(EXTRACT)), None)


def build_extract_panel() -> dict[str, Any]:
    """Lay the panel out; gives its components by name."""
    parts: dict[str, Any] = {"timer": gr.Timer(POLL_SECONDS, active=False)}
    with gr.Accordion(say("library.extract"), open=False, elem_id="library-extract"):
        html_part(f"<p>{say('library.extract_help')}</p>")
        with gr.Row(elem_classes="fields"):
            for name, value in (("original", ""), ("tuned", ""), ("extract_rank", USUAL_RANK), ("extract_name", "")):
                parts[name] = gr.Textbox(
                    value,
                    label=say(
                        {"extract_rank": "library.new_rank", "extract_name": "library.new_name"}.get(
                            name, f"library.{name}"
                        )
                    ),
                    max_lines=1,
                    html_attributes=PLAIN,
                    elem_id=f"extract-{name.removeprefix('extract_')}",
                )
        with gr.Row():
            parts["start"] = gr.Button(
                say("library.extract_start"), variant="primary", size="sm", elem_id="extract-start"
            )
            parts["cancel"] = gr.Button(say("library.cancel"), size="sm", visible=False, elem_id="extract-cancel")
        parts["result"] = html_part(elem_id="extract-result")
    return parts


def connect_extract_panel(tab: LibraryTab, extract: dict[str, Any], page: gr.Tab) -> None:
    outputs: list[Block] = [extract[name] for name in ("result", "start", "cancel", "timer")]
    listing = [tab.parts[name] for name in ("search", "order", "chosen")]

    def state() -> Updates:
        view = latest_extract()
        is_live = view is not None and view.is_live
        return {
            extract["result"]: library_view.tool_result(view),
            extract["start"]: gr.update(interactive=not is_live),
            extract["cancel"]: gr.update(visible=is_live),
            extract["timer"]: gr.update(active=is_live),
        }

    def begin(original: str, tuned: str, rank: str, name: str) -> Updates:
        try:
            start_extract(original, tuned, rank=whole(rank, "library.new_rank", least=1), name=name)
        except (OSError, UserError) as error:
            raise refused(error) from None
        return state()

    def look(search: str, order: str, chosen: str | None) -> Updates:
        updates = state()
        # The new LoRA is in the list without being asked for.
        is_over = updates[extract["timer"]]["active"] is False
        return {**updates, **tab.cards(search, order, chosen)} if is_over else updates

    def cancel() -> Updates:
        view = latest_extract()
        if view is not None and view.is_live:
            cancel_job(view.job)
        return state()

    inputs = [extract[name] for name in ("original", "tuned", "extract_rank", "extract_name")]
    extract["start"].click(begin, inputs, outputs, show_progress="hidden", concurrency_limit=1)
    extract["timer"].tick(look, listing, [*outputs, tab.parts["cards"]], trigger_mode="once", **QUIETLY)
    extract["cancel"].click(cancel, None, outputs, **QUIETLY)
    page.select(state, None, outputs, **QUIETLY)
