"""The Runs page: the list, and one run live. Everything shown comes from run folders; one timer looks again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast, get_args

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component
from gradio.layouts import Column

from fluxgui import run_view
from fluxgui.form_parts import build_question, html_part
from fluxgui.loss_plot import loss_plot
from fluxgui.runs import (
    CommandName,
    RunView,
    RunWatcher,
    contents,
    delete_run,
    find_run,
    pending_commands,
    read_log_tail,
    resume,
    run_name,
    send,
    start_again,
)
from trainer.schema.base import UserError
from trainer.schema.folders import bin_dir
from trainer.schema.run_folder import newest_state_step

LIVE_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 5.0
MAX_LISTED: Final = 200

# Keeps the address of the shown run in the address bar, so that it can be kept, shared between tabs and reloaded.
SHOW_IN_ADDRESS: Final = """(run) => {
    const url = new URL(location.href);
    if (run) url.searchParams.set("run", run);
    history.replaceState(null, "", url);
}"""

Shown = dict[str, str]
"""Per part of the page, a digest of what this browser was sent last."""


@dataclass(frozen=True)
class RunsTab:
    """The page's parts by name. Every look at the runs may change any of them; `shown` remembers what was sent."""

    parts: dict[str, Component | Column]
    smoothing: gr.Slider
    watcher: RunWatcher

    @property
    def outputs(self) -> list[Component | Column]:
        return list(self.parts.values())

    def look(self, run_id: str | None, smoothing: float, shown: Shown) -> list[object]:
        """Values for `outputs`: what changed since `shown`, and nothing for the rest."""
        views = self.watcher.look_at_all()
        found = next((view for view in views if view.run_id == run_id), None)
        if found is None:
            return self._show(views, newest(views), smoothing, shown, choose=True)
        # The list's choice is left alone: the user may have made another one while this look was under way.
        return self._show(views, found, smoothing, shown, choose=False)

    def look_and_choose(self, run_id: str | None, smoothing: float, shown: Shown) -> list[object]:
        """The same, and the list's choice is set to the run."""
        views = self.watcher.look_at_all()
        found = next((view for view in views if view.run_id == run_id), None)
        return self._show(views, found or newest(views), smoothing, shown, choose=True)

    def _show(
        self, views: list[RunView], chosen: RunView | None, smoothing: float, shown: Shown, *, choose: bool
    ) -> list[object]:
        updates = {**_list_updates(views, chosen), **(_run_updates(chosen, smoothing) if chosen is not None else {})}
        digests = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in updates.items()}
        changed: dict[str, object] = {
            name: value for name, value in updates.items() if shown.get(name) != digests[name]
        }
        if choose:
            choices = cast("dict[str, object]", updates["list"])
            changed["list"] = {**choices, "value": chosen.run_id if chosen is not None else None}
        changed["shown"] = {**shown, **digests}
        return [changed.get(name, gr.skip()) for name in self.parts]


def newest(views: list[RunView]) -> RunView | None:
    """The run to show when none was asked for: the newest one alive, else the newest."""
    return next((view for view in views if view.is_live), views[0] if views else None)


def build_runs_tab(watcher: RunWatcher) -> RunsTab:
    """Lay the page out and connect it to the runs. Call inside a `gr.Tab`."""
    with gr.Column(elem_classes="card") as empty:
        html_part(
            '<div class="card-title"><h2>No runs yet</h2>'
            "<p>Start one on the Train page. It shows up here and goes on when this page is closed.</p></div>"
        )
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=240, elem_classes="card", visible=False) as list_column:
            run_list = gr.Radio([], label="Runs, newest first", elem_classes="run-list", elem_id="run-list")
        with gr.Column(scale=3, min_width=320, visible=False) as run:
            with gr.Column(elem_classes="card"):
                header = html_part(elem_id="run-header")
                messages = html_part(elem_id="run-messages")
                with gr.Row():
                    stop = gr.Button("Stop", variant="stop", size="sm", min_width=80, elem_id="run-stop")
                    save = gr.Button("Save now", size="sm", min_width=80, elem_id="run-save")
                    sample = gr.Button("Sample now", size="sm", min_width=80, elem_id="run-sample")
                    pause = gr.Button("Pause", size="sm", min_width=80, elem_id="run-pause")
                    resume_button = gr.Button(
                        "Resume", variant="primary", size="sm", min_width=80, visible=False, elem_id="run-resume"
                    )
                    again = gr.Button("Start again", size="sm", min_width=80, visible=False, elem_id="run-again")
                    delete = gr.Button("Delete", size="sm", min_width=80, visible=False, elem_id="run-delete")
                deleting = build_question("run-delete", yes="Delete it", no="Keep it")
                stopping = build_question("run-stop", yes="Stop it", no="Go on")
                waiting = html_part(elem_id="run-waiting")
            with gr.Column(elem_classes="card"):
                html_part('<div class="card-title"><h2>Loss</h2></div>')
                plot = html_part(elem_id="run-plot")
                smoothing = gr.Slider(0.0, 0.99, 0.9, step=0.01, label="Smoothing", elem_id="run-smoothing")
            with gr.Column(elem_classes="card"):
                html_part('<div class="card-title"><h2>Samples</h2></div>')
                samples = html_part(elem_id="run-samples")
            with gr.Column(elem_classes="card"):
                html_part('<div class="card-title"><h2>Downloads</h2></div>')
                checkpoints = html_part(elem_id="run-checkpoints")
            with gr.Accordion("Log", open=False):
                log = html_part(elem_id="run-log")
            with gr.Accordion("Settings of this run", open=False):
                config = gr.Textbox(label="config.toml", lines=6, max_lines=24, interactive=False, buttons=["copy"])

    shown = gr.State({})
    timer = gr.Timer(LIVE_SECONDS, active=False)
    tab = RunsTab(
        parts={
            "shown": shown,
            "timer": timer,
            "empty": empty,
            "list_column": list_column,
            "list": run_list,
            "run": run,
            "header": header,
            "messages": messages,
            "waiting": waiting,
            "plot": plot,
            "samples": samples,
            "checkpoints": checkpoints,
            "log": log,
            "config": config,
            "stop": stop,
            "save": save,
            "sample": sample,
            "pause": pause,
            "resume": resume_button,
            "again": again,
            "delete": delete,
        },
        smoothing=smoothing,
        watcher=watcher,
    )
    inputs = [run_list, smoothing, shown]
    quietly: dict[str, Any] = {"show_progress": "hidden", "queue": True, "concurrency_limit": 8}
    timer.tick(tab.look, inputs, tab.outputs, trigger_mode="once", **quietly)
    run_list.input(
        lambda: (gr.update(visible=False), gr.update(visible=False)), None, [stopping.box, deleting.box], **quietly
    )
    run_list.input(tab.look, inputs, tab.outputs, **quietly).then(None, [run_list], None, js=SHOW_IN_ADDRESS)
    smoothing.input(tab.look, inputs, tab.outputs, trigger_mode="always_last", **quietly)

    def command(name: CommandName) -> Callable[[str | None, str], None]:
        def ask(run_id: str | None, label: str) -> None:
            found = find_run(run_id)
            if found is not None:
                # The one button that has two meanings says which one it had when it was pressed.
                send(found, "resume" if label == "Resume" else name)

        return ask

    def ask_to_stop(run_id: str | None) -> dict[Block, object]:
        found = find_run(run_id)
        if found is None:
            return {}
        state = watcher.look(found).state
        return stopping.ask(
            f"Stop {run_name(found)} at step {state.step} of {state.num_steps}? What it has learned by then is saved, "
            "and it can be resumed from there.",
            found.path.name,
        )

    stop.click(ask_to_stop, [run_list], stopping.outputs, **quietly)
    stopping.yes.click(lambda: gr.update(visible=False), None, [stopping.box], **quietly)
    buttons: tuple[tuple[str, gr.Button, Component], ...] = (
        ("stop", stopping.yes, stopping.subject),
        ("save", save, run_list),
        ("sample", sample, run_list),
        ("pause", pause, run_list),
    )
    for name, button, meant in buttons:
        assert name in get_args(CommandName)
        button.click(command(cast("CommandName", name)), [meant, button], None, **quietly).then(
            tab.look, inputs, tab.outputs, **quietly
        )

    def go_on(run_id: str | None) -> None:
        found = find_run(run_id)
        if found is None:
            return
        try:
            resume(found)
        except (OSError, UserError) as error:
            raise gr.Error(f"The run cannot be resumed: {error}", print_exception=False) from None

    resume_button.click(go_on, [run_list], None, **quietly).then(tab.look, inputs, tab.outputs, **quietly)

    def ask_to_delete(run_id: str | None) -> dict[Block, object]:
        found = find_run(run_id)
        if found is None:
            return {}
        return deleting.ask(run_view.deletion(run_name(found), contents(found), str(bin_dir())), found.path.name)

    def delete_it(run_id: str | None) -> None:
        found = find_run(run_id)
        if found is None:
            return
        try:
            delete_run(found)
        except UserError as error:
            raise gr.Error(f"The run cannot be deleted: {error}", print_exception=False) from None
        watcher.forget(found)

    delete.click(ask_to_delete, [run_list], deleting.outputs, **quietly)
    deleting.yes.click(lambda: gr.update(visible=False), None, [deleting.box], **quietly)
    deleting.yes.click(delete_it, [deleting.subject], None, **quietly).then(
        tab.look_and_choose, inputs, tab.outputs, **quietly
    ).then(None, [run_list], None, js=SHOW_IN_ADDRESS)

    def restart(run_id: str | None) -> str | None:
        found = find_run(run_id)
        if found is None:
            return run_id
        try:
            return start_again(found).path.name
        except (OSError, UserError) as error:
            raise gr.Error(f"The run cannot be started: {error}", print_exception=False) from None

    started = gr.State(None)
    again.click(restart, [run_list], [started], **quietly).success(
        tab.look_and_choose, [started, smoothing, shown], tab.outputs, **quietly
    ).then(None, [run_list], None, js=SHOW_IN_ADDRESS)
    return tab


def _list_updates(views: list[RunView], chosen: RunView | None) -> dict[str, object]:
    choices = [
        (run_view.one_line(view.name, view.status, view.state, view.run_id), view.run_id) for view in views[:MAX_LISTED]
    ]
    live = any(view.is_live for view in views)
    return {
        "list": gr.update(choices=choices),
        "list_column": gr.update(visible=bool(views)),
        "empty": gr.update(visible=not views),
        "run": gr.update(visible=chosen is not None),
        "timer": gr.update(value=LIVE_SECONDS if live else IDLE_SECONDS, active=True),
    }


def _run_updates(view: RunView, smoothing: float) -> dict[str, object]:
    status, state = view.status, view.state
    tail = read_log_tail(view.run)
    obeys = view.is_live and status.state != "queued"
    trains = obeys and state.step > 0
    return {
        "header": run_view.header(view.name, status, state),
        "messages": run_view.messages(status, state, tail),
        "waiting": run_view.waiting(
            pending_commands(view.run) if view.is_live else [],
            is_live=view.is_live,
            can_resume=view.can_resume,
            state_step=newest_state_step(view.run) if view.can_resume else None,
        ),
        "plot": loss_plot(state.points, smoothing=smoothing, num_steps=state.num_steps, validation=state.validation),
        "samples": run_view.samples(view.run_id, state.samples),
        "checkpoints": run_view.checkpoints(
            # Old ones may have been removed since.
            view.run_id,
            [checkpoint for checkpoint in state.checkpoints if (view.run.path / checkpoint.path).is_file()],
        ),
        "log": run_view.log(view.run_id, tail),
        "config": view.run.config_toml.read_text(encoding="utf-8"),
        "stop": gr.update(visible=view.is_live, interactive=obeys),
        "save": gr.update(visible=view.is_live, interactive=trains),
        "sample": gr.update(visible=view.is_live, interactive=trains),
        "pause": gr.update(visible=view.is_live, value="Resume" if state.is_paused else "Pause", interactive=obeys),
        "resume": gr.update(visible=view.can_resume),
        "again": gr.update(visible=not view.is_live),
        "delete": gr.update(visible=not view.is_live),
    }
