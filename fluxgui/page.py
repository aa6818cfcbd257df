"""The whole page: a heading, the tabs, and what leads from one to the other."""

from __future__ import annotations

from typing import Any, Final

import gradio as gr

from fluxgui.api import add_api, hide_the_rest
from fluxgui.dataset_layout import build_dataset_tab
from fluxgui.dataset_wiring import connect_dataset_page
from fluxgui.demo import start_demo
from fluxgui.form_parts import html_part
from fluxgui.language import say
from fluxgui.library_layout import build_library_tab
from fluxgui.presets_bar import choices
from fluxgui.presets_tab import build_presets_tab
from fluxgui.runs import RunWatcher
from fluxgui.runs_actions import SHOW_IN_ADDRESS, build_runs_tab
from fluxgui.settings_tab import build_settings_tab
from fluxgui.system_line import LoadSampler
from fluxgui.train_layout import build_train_tab
from fluxgui.train_tab import IN_ORDER
from fluxgui.vram import detect_gpu
from trainer.schema.base import UserError
from trainer.schema.folders import runs_dir
from trainer.schema.run_folder import list_runs

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
TRAIN, DATASET, RUNS, LIBRARY, PRESETS, SETTINGS = "train", "dataset", "runs", "library", "presets", "settings"

# A tab also counts as selected when the page is built, before it was known which one the address names.
ARRIVED: Final = "() => { window.fluxguiArrived = true; }"
PAGE_IN_ADDRESS: Final = """() => {
    if (!window.fluxguiArrived) return;
    const url = new URL(location.href);
    url.searchParams.set("tab", "%s");
    history.replaceState(null, "", url);
}"""


def build_page(watcher: RunWatcher, sampler: LoadSampler) -> gr.Blocks:
    with gr.Blocks(title="FluxGUI", fill_width=True) as page:
        add_api(watcher)  # first, as a handler of the same name would take an endpoint's
        html_part(f'<div class="page-head"><h1>{say("page.title")}</h1><p>{say("page.subtitle")}</p></div>')
        with gr.Column(visible=False, elem_classes="card", elem_id="welcome") as welcome:
            html_part(f'<div class="card-title"><h2>{say("page.first_time")}</h2><p>{say("page.about_demo")}</p></div>')
            try_demo = gr.Button(say("page.try_demo"), variant="primary", elem_id="try-demo")
        with gr.Tabs(elem_id="pages") as tabs:
            with gr.Tab(say("page.train"), id=TRAIN) as train_page:
                train = build_train_tab(detect_gpu())
            with gr.Tab(say("dataset.tab"), id=DATASET) as dataset_page:
                dataset = build_dataset_tab(train)
            with gr.Tab(say("page.runs"), id=RUNS) as runs_page:
                runs = build_runs_tab(watcher, train, tabs, sampler)
            with gr.Tab(say("library.tab"), id=LIBRARY) as library_page:
                library = build_library_tab(library_page)
            with gr.Tab(say("presets.tab"), id=PRESETS) as presets_page:
                build_presets_tab(train, tabs, presets_page)
            with gr.Tab(say("settings.tab"), id=SETTINGS) as settings_page:
                build_settings_tab(train, tabs, settings_page)

        started = train.parts["started"]
        assert isinstance(started, gr.State)
        show = runs.parts

        def run_demo() -> str:
            try:
                return start_demo().path.name
            except (OSError, UserError) as error:
                raise gr.Error(say("page.no_demo", reason=error), print_exception=False) from None

        def go_to_runs() -> list[object]:
            return [gr.update(selected=RUNS), gr.update(visible=False)]

        to_models = train.parts["to_models"]
        assert isinstance(to_models, gr.Button)
        to_models.click(lambda: gr.update(selected=SETTINGS), None, [tabs], **QUIETLY)
        try_demo.click(run_demo, None, [started], show_progress="minimal", concurrency_limit=1)
        (
            # First the run and then its tab, which would show the run before last for a moment.
            started.change(runs.look_and_choose, [started, *runs.inputs[1:]], runs.outputs, **QUIETLY)
            .then(go_to_runs, None, [tabs, welcome], **QUIETLY)
            .then(None, [show["list"]], None, js=PAGE_IN_ADDRESS % RUNS)
            .then(None, [show["list"]], None, js=SHOW_IN_ADDRESS)
        )
        runs_page.select(None, None, None, js=PAGE_IN_ADDRESS % RUNS)
        runs_page.select(runs.look, runs.inputs, runs.outputs, **QUIETLY)
        pages = {
            TRAIN: train_page,
            DATASET: dataset_page,
            LIBRARY: library_page,
            PRESETS: presets_page,
            SETTINGS: settings_page,
        }
        for name, tab in pages.items():
            tab.select(None, None, None, js=PAGE_IN_ADDRESS % name)
        connect_dataset_page(dataset, page, dataset_page, tabs)
        library.show_at_visits(page)

        def arrive(remembered: dict[str, object] | None, request: gr.Request) -> dict[Any, Any]:
            """The page as the address says, with the form as this browser left it."""
            asked = request.query_params
            looked = dict(zip(runs.outputs, runs.look_and_choose(asked.get("run"), {}), strict=True))
            first_visit = not list_runs(runs_dir())
            return {
                **looked,
                **train.arrive(remembered),
                # The page was built when the program started; presets may have come since.
                train.presets.own: gr.update(choices=choices("own")),
                # Without a name the page stays where it is: somebody may have gone on before this answer came.
                tabs: gr.update(selected=asked["tab"]) if asked.get("tab") in (*pages, RUNS) else gr.skip(),
                welcome: gr.update(visible=first_visit),
            }

        (
            page.load(
                arrive,
                [train.parts["remembered"]],
                [*runs.outputs, *train.arrival, train.presets.own, tabs, welcome],
                **QUIETLY,
            )
            .then(None, None, None, js=ARRIVED)
            .then(train.check, train.inputs, train.outputs, **IN_ORDER)
        )
    hide_the_rest(page)
    return page
