"""Layout of the Runs page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import gradio as gr

from fluxgui.form_parts import PLAIN, Question, build_question, html_part
from fluxgui.language import say
from fluxgui.run_compare import MAX_COMPARED
from fluxgui.runs import RunWatcher
from fluxgui.runs_tab import LIVE_SECONDS, Element, RunsTab
from fluxgui.system_line import LoadSampler

# Buttons in the list and in the queue. The one that had the focus has it again when the part is written anew.
PRESSES: Final = """
let focused = null;
const place = (b) => `[data-action="${b.dataset.action}"][data-run="${CSS.escape(b.dataset.run || "")}"]`;
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (button) trigger("click", {action: button.dataset.action, run: button.dataset.run || ""});
});
element.addEventListener("focusin", (event) => {
  const button = event.target.closest("button[data-action]");
  focused = button ? place(button) : null;
});
document.addEventListener("pointerdown", (event) => { if (!element.contains(event.target)) focused = null; });
document.addEventListener("focusin", (event) => { if (!element.contains(event.target)) focused = null; });
watch("value", () => {
  if (!focused || document.activeElement !== document.body) return;
  const again = element.querySelector(focused);
  if (again && !again.disabled) again.focus({preventScroll: true});
});
"""
# Who comes back to the browser's tab sees the present at once.
COMES_BACK: Final = """
document.addEventListener("visibilitychange", () => { if (!document.hidden) trigger("submit"); });
"""
# Steps between the two ends of a drag across the chart.
ZOOMS: Final = """
let start = null;
const share = (event) => {
  const box = element.querySelector("svg").getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
};
element.addEventListener("pointerdown", (event) => {
  if (event.button === 0 && event.target.closest("svg")) { start = share(event); event.preventDefault(); }
});
document.addEventListener("pointerup", (event) => {
  if (start === null) return;
  const figure = element.querySelector("figure"), from = start;
  start = null;
  if (!figure) return;
  const [low, high] = [from, share(event)].sort((a, b) => a - b);
  const [first, last] = [Number(figure.dataset.first), Number(figure.dataset.last)];
  if (high - low < 0.02) return;
  trigger("select", {first: Math.round(first + low * (last - first)), last: Math.round(first + high * (last - first))});
});
"""


@dataclass(frozen=True)
class RunsLayout:
    """The page, and the parts of it that only lead somewhere."""

    tab: RunsTab
    duplicate: gr.Button
    deleting: Question
    stopping: Question


def _heading(name: str) -> None:
    html_part(f'<div class="card-title"><h2>{say(name)}</h2></div>')


def _pressed(elem_id: str, script: str) -> gr.HTML:
    return gr.HTML("", elem_id=elem_id, js_on_load=script, elem_classes="part")


def _button(text: str, name: str, *, variant: str = "secondary", visible: bool = True) -> gr.Button:
    kind = {"stop": "stop", "primary": "primary"}.get(variant, "secondary")
    return gr.Button(text, variant=kind, size="sm", min_width=80, visible=visible, elem_id=f"run-{name}")  # pyright: ignore[reportArgumentType]


def build_runs_layout(watcher: RunWatcher, sampler: LoadSampler) -> RunsLayout:
    """Lay the page out. Call inside a `gr.Tab`."""
    parts: dict[str, Element] = {}
    parts["shown"] = shown = gr.State({})
    parts["window"] = window = gr.State(None)
    parts["timer"] = gr.Timer(LIVE_SECONDS, active=False)
    # Scripts can read and write these, which a state does not allow.
    parts["list"] = chosen = gr.Textbox(visible="hidden", elem_id="run-chosen", show_label=False)
    away = gr.Textbox("", visible=False)
    with gr.Column(elem_classes="card") as parts["empty"]:
        html_part(f'<div class="card-title"><h2>{say("runs.empty")}</h2><p>{say("runs.empty_text")}</p></div>')
    with gr.Column(elem_classes="card", visible=False, elem_id="run-queue") as parts["queue_box"]:
        parts["queue"] = _pressed("run-queue-list", PRESSES)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260, elem_classes="card", visible=False) as parts["list_column"]:
            search = gr.Textbox(label=say("runs.search"), max_lines=1, html_attributes=PLAIN, elem_id="run-search")
            parts["cards"] = _pressed("run-cards", PRESSES + COMES_BACK)
        with gr.Column(scale=3, min_width=320, visible=False) as parts["run"]:
            with gr.Column(elem_classes="card"):
                parts["header"] = html_part(elem_id="run-header")
                parts["system"] = html_part(elem_id="run-system")
                parts["messages"] = html_part(elem_id="run-messages")
                with gr.Row():
                    parts["stop"] = _button(say("runs.stop"), "stop", variant="stop")
                    parts["save"] = _button(say("runs.save_now"), "save")
                    parts["sample"] = _button(say("runs.sample_now"), "sample")
                    parts["pause"] = _button(say("runs.pause"), "pause")
                    parts["resume"] = _button(say("runs.resume"), "resume", variant="primary", visible=False)
                    parts["again"] = _button(say("runs.again"), "again", visible=False)
                    duplicate = _button(say("runs.duplicate"), "duplicate")
                    parts["delete"] = _button(say("runs.delete"), "delete", visible=False)
                deleting = build_question("run-delete", yes=say("runs.delete_it"), no=say("runs.keep_it"))
                stopping = build_question("run-stop", yes=say("runs.stop_it"), no=say("runs.go_on"))
                parts["waiting"] = html_part(elem_id="run-waiting")
            with gr.Column(elem_classes="card"):
                chart = gr.Radio(
                    [(say("runs.loss"), "loss"), (say("runs.levels"), "levels"), (say("runs.rate"), "rate")],
                    value="loss",
                    label=say("runs.chart"),
                    elem_id="run-chart",
                )
                parts["plot"] = _pressed("run-plot", PRESSES + ZOOMS)
                smoothing = gr.Slider(0.0, 0.99, 0.9, step=0.01, label=say("runs.smoothing"), elem_id="run-smoothing")
            with gr.Column(elem_classes="card"):
                _heading("runs.samples")
                parts["samples"] = html_part(elem_id="run-samples")
            with gr.Column(elem_classes="card"):
                _heading("runs.downloads")
                parts["checkpoints"] = html_part(elem_id="run-checkpoints")
            with gr.Column(elem_classes="card"):
                parts["notes"] = gr.Textbox(
                    label=say("runs.notes"), info=say("runs.notes_help"), lines=2, max_lines=10, elem_id="run-notes"
                )
            with gr.Accordion(say("runs.compare"), open=False, elem_id="run-compare"):
                parts["compared"] = compared = gr.Dropdown(
                    [],
                    multiselect=True,
                    max_choices=MAX_COMPARED - 1,
                    label=say("runs.compare_with"),
                    elem_id="run-compared",
                )
                parts["comparison"] = html_part(elem_id="run-comparison")
            with gr.Accordion(say("runs.log"), open=False):
                level = gr.Radio(
                    [(say("runs.log_all"), "all"), (say("runs.log_problems"), "problems")],
                    value="all",
                    label=say("runs.log_level"),
                    elem_id="run-log-level",
                )
                parts["log"] = html_part(elem_id="run-log")
            with gr.Accordion(say("runs.settings"), open=False):
                parts["config"] = gr.Textbox(
                    label="config.toml", lines=6, max_lines=24, interactive=False, buttons=["copy"]
                )
    settings = [smoothing, search, chart, window, level, compared, away]
    tab = RunsTab(parts=parts, inputs=[chosen, shown, *settings], watcher=watcher, sampler=sampler)
    return RunsLayout(tab, duplicate, deleting, stopping)
