"""The Runs page: what its buttons do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast, get_args

import gradio as gr
from gradio.blocks import Block

from fluxgui import run_view
from fluxgui.form_parts import NOTHING
from fluxgui.importing import fill_form, read_pasted
from fluxgui.language import say
from fluxgui.run_start import waiting_runs
from fluxgui.runs import (
    CommandName,
    RunWatcher,
    contents,
    delete_run,
    find_run,
    resume,
    run_name,
    send,
    start_again,
    write_notes,
)
from fluxgui.runs_layout import RunsLayout, build_runs_layout
from fluxgui.runs_tab import RunsTab, Shown
from fluxgui.system_line import LoadSampler
from fluxgui.train_tab import IN_ORDER, TrainTab
from trainer.schema.base import UserError
from trainer.schema.folders import bin_dir
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_queue import move, withdraw

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "queue": True, "concurrency_limit": 8}
TRAIN_PAGE: Final = "train"
Result = TypeVar("Result")
MAX_NOTES: Final = 20_000

# Keeps the address of the shown run in the address bar, so that it can be kept, shared between tabs and reloaded.
SHOW_IN_ADDRESS: Final = """(run) => {
    const url = new URL(location.href);
    if (run) url.searchParams.set("run", run);
    history.replaceState(null, "", url);
}"""
# The last of the settings says whether anybody sees the page.
WITH_AWAY: Final = """(...values) => {
    const seen = document.querySelector("#run-cards");
    values[values.length - 1] = document.hidden || !seen || seen.offsetParent === null ? "away" : "";
    return values;
}"""


def build_runs_tab(watcher: RunWatcher, train: TrainTab, pages: gr.Tabs, sampler: LoadSampler) -> RunsTab:
    """Lay the page out and connect it. Call inside a `gr.Tab` of `pages`."""
    layout = build_runs_layout(watcher, sampler)
    tab = layout.tab
    parts = cast("dict[str, Any]", tab.parts)
    chosen = parts["list"]
    parts["timer"].tick(tab.look, tab.inputs, tab.outputs, trigger_mode="once", js=WITH_AWAY, **QUIETLY)
    smoothing, search, chart, _, level, compared, _ = tab.inputs[2:]
    for component in (smoothing, search, chart, level, compared):
        component.input(tab.look, tab.inputs, tab.outputs, trigger_mode="always_last", **QUIETLY)
    parts["cards"].submit(tab.look, tab.inputs, tab.outputs, trigger_mode="once", **QUIETLY)

    def pick(event: gr.EventData, _run: str, shown: Shown, *settings: Any) -> list[object]:
        return [*tab.look_and_choose(_told(event, "run"), shown, *settings), *[gr.update(visible=False)] * 2]

    questions = [layout.stopping.box, layout.deleting.box]
    parts["cards"].click(pick, tab.inputs, [*tab.outputs, *questions], **QUIETLY).then(
        None, [chosen], None, js=SHOW_IN_ADDRESS
    )

    _connect_chart(tab)
    _connect_queue(tab)
    _connect_commands(layout)
    _connect_ends(layout)
    _connect_notes(tab)
    _connect_duplicate(layout, train, pages)
    return tab


def _told(event: gr.EventData, name: str) -> str:
    """What a script of the page says along with its event."""
    return str(getattr(event, name, ""))


def _connect_chart(tab: RunsTab) -> None:
    plot = cast("Any", tab.parts["plot"])

    def drag(event: gr.EventData, run_id: str, shown: Shown, *settings: Any) -> list[object]:
        first, last = _told(event, "first"), _told(event, "last")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            return [gr.skip()] * len(tab.parts)
        return tab.zoom((int(first), int(last)), run_id, shown, *settings)

    def press(event: gr.EventData, run_id: str, shown: Shown, *settings: Any) -> list[object]:
        found = find_run(run_id)
        if found is None or _told(event, "action") == "whole":
            return tab.zoom(None, run_id, shown, *settings)
        state = tab.watcher.look(found).state
        return tab.zoom((state.step * 3 // 4, max(state.step, 1)), run_id, shown, *settings)

    plot.select(drag, tab.inputs, tab.outputs, **QUIETLY)
    plot.click(press, tab.inputs, tab.outputs, **QUIETLY)


def _connect_queue(tab: RunsTab) -> None:
    queue = cast("Any", tab.parts["queue"])

    def press(event: gr.EventData) -> None:
        found = find_run(_told(event, "run"))
        waiting = waiting_runs()
        if found is None or found not in waiting:
            gr.Info(say("runs.not_waiting"))
            return
        match _told(event, "action"):
            case "up":
                move(waiting, found, -1)
            case "down":
                move(waiting, found, 1)
            case "cancel":
                withdraw(found)
            case _:
                pass

    queue.click(press, None, None, **QUIETLY).then(tab.look, tab.inputs, tab.outputs, **QUIETLY)


def _connect_commands(layout: RunsLayout) -> None:
    tab, stopping = layout.tab, layout.stopping
    parts = cast("dict[str, Any]", tab.parts)
    chosen = parts["list"]

    def command(name: CommandName) -> Callable[[str | None, str], None]:
        def ask(run_id: str | None, label: str) -> None:
            found = find_run(run_id)
            if found is not None:
                # The one button that has two meanings says which one it had when it was pressed.
                send(found, "resume" if label == say("runs.resume") else name)

        return ask

    def ask_to_stop(run_id: str | None) -> dict[Block, object]:
        found = find_run(run_id)
        if found is None:
            return NOTHING
        state = tab.watcher.look(found).state
        return stopping.ask(
            say("runs.ask_to_stop", name=run_name(found), step=state.step, total=state.num_steps),
            found.path.name,
        )

    parts["stop"].click(ask_to_stop, [chosen], stopping.outputs, **QUIETLY)
    stopping.yes.click(lambda: gr.update(visible=False), None, [stopping.box], **QUIETLY)
    buttons: tuple[tuple[str, Any, Any], ...] = (
        ("stop", stopping.yes, stopping.subject),
        ("save", parts["save"], chosen),
        ("sample", parts["sample"], chosen),
        ("pause", parts["pause"], chosen),
    )
    for name, button, meant in buttons:
        assert name in get_args(CommandName)
        button.click(command(cast("CommandName", name)), [meant, button], None, **QUIETLY).then(
            tab.look, tab.inputs, tab.outputs, **QUIETLY
        )


def _connect_ends(layout: RunsLayout) -> None:
    """Resume, delete, start again: what there is to do with a run that ended."""
    tab, deleting = layout.tab, layout.deleting
    parts = cast("dict[str, Any]", tab.parts)
    chosen = parts["list"]

    def go_on(run_id: str | None) -> None:
        found = find_run(run_id)
        if found is not None:
            _or_error(say("runs.not_resumed"), lambda: resume(found))

    parts["resume"].click(go_on, [chosen], None, **QUIETLY).then(tab.look, tab.inputs, tab.outputs, **QUIETLY)

    def ask_to_delete(run_id: str | None) -> dict[Block, object]:
        found = find_run(run_id)
        if found is None:
            return NOTHING
        return deleting.ask(run_view.deletion(run_name(found), contents(found), str(bin_dir())), found.path.name)

    def delete_it(run_id: str | None) -> None:
        found = find_run(run_id)
        if found is not None:
            _or_error(say("runs.not_deleted"), lambda: delete_run(found))
            tab.watcher.forget(found)

    parts["delete"].click(ask_to_delete, [chosen], deleting.outputs, **QUIETLY)
    deleting.yes.click(lambda: gr.update(visible=False), None, [deleting.box], **QUIETLY)
    deleting.yes.click(delete_it, [deleting.subject], None, **QUIETLY).then(
        tab.look_and_choose, tab.inputs, tab.outputs, **QUIETLY
    ).then(None, [chosen], None, js=SHOW_IN_ADDRESS)

    def restart(run_id: str | None) -> str | None:
        found = find_run(run_id)
        return run_id if found is None else _or_error(say("runs.not_started"), lambda: start_again(found)).path.name

    started = gr.State(None)
    parts["again"].click(restart, [chosen], [started], **QUIETLY).success(
        tab.look_and_choose, [started, *tab.inputs[1:]], tab.outputs, **QUIETLY
    ).then(None, [chosen], None, js=SHOW_IN_ADDRESS)


def _connect_notes(tab: RunsTab) -> None:
    notes = cast("Any", tab.parts["notes"])

    def keep(run_id: str | None, text: str, shown: Shown) -> Shown:
        found = find_run(run_id)
        if found is None:
            return shown
        kept = text[:MAX_NOTES]
        _or_error(say("runs.notes_not_saved"), lambda: write_notes(found, kept))
        # The browser has them already: they are not sent back into what is being typed.
        return {**shown, "notes": hashlib.sha256(repr(kept).encode()).hexdigest()}

    notes.blur(keep, [tab.inputs[0], notes, tab.inputs[1]], [tab.inputs[1]], trigger_mode="multiple", **QUIETLY)


def _connect_duplicate(layout: RunsLayout, train: TrainTab, pages: gr.Tabs) -> None:
    """The form filled with a run's settings, on its page."""

    def fill(run_id: str | None) -> dict[Block, Any]:
        found = find_run(run_id)
        if found is None:
            return NOTHING
        values, left_out = _or_error(say("runs.not_duplicated"), lambda: form_values(found))
        gr.Info(say("runs.duplicated", name=run_name(found)))
        for line in left_out:
            gr.Warning(line)
        return {**train.take_over(values), pages: gr.update(selected=TRAIN_PAGE)}

    layout.duplicate.click(
        fill, [layout.tab.inputs[0]], [*train.taken_over, pages], show_progress="hidden", concurrency_limit=8
    ).then(train.check, train.inputs, train.outputs, **IN_ORDER)


def form_values(run: RunFolder) -> tuple[dict[str, object], tuple[str, ...]]:
    """A run's settings as the Train page's form has them, and a line for each that it has no place for."""
    config = run.config_toml.read_text(encoding="utf-8")
    filling = fill_form(read_pasted(config, run.dataset_toml.read_text(encoding="utf-8")))
    prompts = run.sample_prompts_txt.read_text(encoding="utf-8").strip()
    return {**filling.values, "sample_prompt_lines": prompts}, filling.left_out


def _or_error(what: str, work: Callable[[], Result]) -> Result:
    """What `work` gives; what it cannot do is told on the page."""
    try:
        return work()
    except (OSError, UserError) as error:
        raise gr.Error(f"{what}: {error}", print_exception=False) from None
