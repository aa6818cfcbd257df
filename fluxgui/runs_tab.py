"""The Runs page: what it shows. Everything comes from run folders; one timer looks again, and only changes are sent."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import gradio as gr
from gradio.blocks import BlockContext
from gradio.components import Component

from fluxgui import run_files_view, run_list_view, run_view
from fluxgui.language import say
from fluxgui.loss_plot import Chart, Window, draw_chart
from fluxgui.run_compare import comparison
from fluxgui.run_notices import notices
from fluxgui.runs import LOG_TAIL_BYTES, LONG_TAIL_BYTES, RunView, RunWatcher, pending_commands, read_log_tail
from fluxgui.system_line import LoadSampler, system_line
from trainer.schema.run_folder import newest_state_step
from trainer.schema.run_queue import in_order

LIVE_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 5.0
AWAY_SECONDS: Final = 20.0
"""Between looks while nobody sees the page: another tab is in front, of the browser or of the program."""

Element = Component | BlockContext
Shown = dict[str, str]
"""Per part of the page, a digest of what this browser was sent last."""


class Settings(NamedTuple):
    """What the user set for what is shown, in the order of `RunsTab.inputs` behind the run and what was shown.

    A browser sends None for what was never touched.
    """

    smoothing: float = 0.9
    search: str | None = None
    chart: Chart = "loss"
    window: Window = None
    level: str = "all"
    compared: Sequence[str] | None = None
    away: object = ""


@dataclass(frozen=True)
class RunsTab:
    """The page's parts by name. Every look at the runs may change any of them; `shown` remembers what was sent."""

    parts: dict[str, Element]
    inputs: list[Any]
    """The chosen run's id, `shown`, and the components of `Settings`."""
    watcher: RunWatcher
    sampler: LoadSampler

    @property
    def outputs(self) -> list[Element]:
        return list(self.parts.values())

    def look(self, run_id: str | None, shown: Shown, *settings: Any) -> list[object]:
        """Values for `outputs`: what changed since `shown`, and nothing for the rest."""
        return self._look(run_id, shown, Settings(*settings), choose=False)

    def look_and_choose(self, run_id: str | None, shown: Shown, *settings: Any) -> list[object]:
        """The same, and `run_id` becomes the run that is shown, from its first step to its last."""
        return self._look(run_id, shown, Settings(*settings)._replace(window=None), choose=True)

    def zoom(self, window: Window, run_id: str | None, shown: Shown, *settings: Any) -> list[object]:
        """The same, and the chart shows the steps of `window` from now on."""
        looked = self._look(run_id, shown, Settings(*settings)._replace(window=window), choose=False)
        looked[list(self.parts).index("window")] = window
        return looked

    def _look(self, run_id: str | None, shown: Shown, settings: Settings, *, choose: bool) -> list[object]:
        views = self.watcher.look_at_all()
        found = next((view for view in views if view.run_id == run_id), None)
        # The choice is left alone: the user may have made another one while this look was under way.
        choose = choose or found is None
        chosen = found or newest(views)
        updates = self._list_updates(views, chosen, settings)
        if chosen is not None:
            updates |= _run_updates(chosen, settings)
            compared = [view for view in views if view.run_id in (settings.compared or ()) and view is not chosen]
            updates["comparison"] = comparison([chosen, *compared], smoothing=settings.smoothing) if compared else ""
        digests = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in updates.items()}
        changed: dict[str, object] = {
            name: value for name, value in updates.items() if shown.get(name) != digests[name]
        }
        if choose:
            changed["list"] = chosen.run_id if chosen is not None else None
            changed["window"] = None
        changed["shown"] = {**shown, **digests}
        return [changed.get(name, gr.skip()) for name in self.parts]

    def _list_updates(self, views: list[RunView], chosen: RunView | None, settings: Settings) -> dict[str, object]:
        waiting = in_order([view.run for view in views if view.status.state == "queued"])
        by_path = {view.run.path: view for view in views}
        at_work = [view for view in views if view.is_live and view.status.state != "queued"]
        queue = run_list_view.queue([by_path[run.path] for run in waiting], at_work)
        live = bool(at_work) or bool(waiting)
        seconds = AWAY_SECONDS if settings.away else LIVE_SECONDS if live else IDLE_SECONDS
        others = [
            (" · ".join(filter(None, (view.name, run_view.made_at(view.run_id)))), view.run_id)
            for view in views[: run_list_view.MAX_LISTED]
            if view.state.points and view is not chosen
        ]
        return {
            "cards": run_list_view.cards(
                views, chosen.run_id if chosen is not None else None, search=settings.search or ""
            ),
            "queue": queue,
            "queue_box": gr.update(visible=bool(queue)),
            "list_column": gr.update(visible=bool(views)),
            "empty": gr.update(visible=not views),
            "run": gr.update(visible=chosen is not None),
            "compared": gr.update(choices=others),
            "timer": gr.update(value=seconds, active=True),
            "system": system_line(self.sampler.loads) if at_work else "",
        }


def newest(views: list[RunView]) -> RunView | None:
    """The run to show when none was asked for: the newest one alive, else the newest."""
    return next((view for view in views if view.is_live), views[0] if views else None)


def _run_updates(view: RunView, settings: Settings) -> dict[str, object]:
    status, state = view.status, view.state
    only_problems = settings.level == "problems"
    tail = read_log_tail(view.run, LONG_TAIL_BYTES if only_problems else LOG_TAIL_BYTES)
    is_waiting = status.state == "queued"
    obeys = view.is_live and status.state not in ("queued", "starting")
    trains = obeys and state.step > 0
    return {
        "header": run_view.header(view.name, status, state),
        "messages": run_view.messages(status, state, tail, notices(state, view.run.path)),
        "waiting": run_view.waiting(
            pending_commands(view.run) if view.is_live else [],
            is_live=view.is_live,
            is_queued=is_waiting,
            can_resume=view.can_resume,
            state_step=newest_state_step(view.run) if view.can_resume else None,
        ),
        "plot": draw_chart(state, settings.chart, smoothing=settings.smoothing, window=_window(settings.window)),
        "samples": run_files_view.samples(view.run_id, state.samples),
        "checkpoints": run_files_view.checkpoints(
            # Old ones may have been removed since.
            view.run_id,
            [checkpoint for checkpoint in state.checkpoints if (view.run.path / checkpoint.path).is_file()],
        ),
        "log": run_files_view.log(view.run_id, tail, only_problems=only_problems),
        "notes": view.notes,
        "config": view.run.config_toml.read_text(encoding="utf-8"),
        "stop": gr.update(visible=view.is_live and not is_waiting, interactive=obeys),
        "save": gr.update(visible=view.is_live and not is_waiting, interactive=trains),
        "sample": gr.update(visible=view.is_live and not is_waiting, interactive=trains),
        "pause": gr.update(
            visible=view.is_live and not is_waiting,
            value=say("runs.resume") if state.is_paused else say("runs.pause"),
            interactive=obeys,
        ),
        "resume": gr.update(visible=view.can_resume, value=say("runs.resume") if state.num_seen else say("runs.start")),
        "again": gr.update(visible=not view.is_live),
        "delete": gr.update(visible=not view.is_live),
    }


def _window(value: object) -> Window:
    """A window as the page's state holds it: gradio makes lists of tuples."""
    if isinstance(value, (list, tuple)) and len(cast("Sequence[object]", value)) == 2:
        first, last = cast("Sequence[Any]", value)
        return int(first), int(last)
    return None
