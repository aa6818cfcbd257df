"""The Train page laid out: three cards (model, pictures, go), the start beside them, and below what they have preset."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, Final

import gradio as gr
import psutil
from gradio.components import Component
from gradio.events import Dependency

from fluxgui import train_view
from fluxgui.all_options import all_options_html, script
from fluxgui.fields import (
    BUCKETS,
    FLOW,
    LEARNING,
    LENGTH,
    MEMORY,
    MODELS,
    OPTIMIZER,
    OTHER,
    SAMPLES,
    SAVING,
    TOKENIZERS,
    Field,
    make_fields,
)
from fluxgui.form_parts import build_fields, html_part
from fluxgui.language import say
from fluxgui.pictures import CAPTION_SUFFIX, IMAGE_SUFFIXES, MAX_FILES
from fluxgui.presets_bar import PresetsBar, build_card, build_presets_bar, build_purpose
from fluxgui.train_length import LENGTHS
from fluxgui.train_tab import IN_ORDER, QUIETLY, USUAL_LENGTH, TrainTab
from fluxgui.vram import Gpu

MORE_NAMES: Final = frozenset({*OPTIMIZER, *FLOW, *BUCKETS, *OTHER[:1]})
USUAL_GB: Final = 24

# The first field with a problem comes into view and takes the keyboard; without one, what is said beside the button does.
TO_FIRST_PROBLEM: Final = """() => setTimeout(() => {
    const bad = [...document.querySelectorAll("#train-grid .field-bad")].filter((field) => field.offsetParent);
    bad.sort((a, b) => a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const place = bad[0] ?? document.querySelector("#problems .bad, #problems .warn");
    if (!place) return;
    place.scrollIntoView({ block: "center", behavior: still ? "auto" : "smooth" });
    place.querySelector("input, textarea")?.focus({ preventScroll: true });
}, 250)"""

Form = dict[str, Component]
Parts = dict[str, Component]
Fields = dict[str, Field]


def build_train_tab(gpu: Gpu | None) -> TrainTab:
    """Lay the page out and connect it. Call inside a `gr.Tab`. `started` changes when a run was started."""
    fields = make_fields()
    form: Form = {}
    parts: Parts = {}
    folds: list[tuple[frozenset[str], gr.Accordion]] = []
    # The order here is that of the keyboard; style.css puts the second column beside the others where there is room.
    with gr.Row(equal_height=False, elem_id="train-grid"):
        with gr.Column(min_width=0, elem_classes="steps"):
            buttons = _build_model(fields, form, parts, folds)
            _build_pictures(fields, form, parts)
            purpose, card = _build_go(fields, form, parts, gpu)
        with gr.Column(min_width=0, elem_classes="side"):
            start = _build_start(parts)
            estimate = _build_memory(parts, gpu)
        with gr.Column(min_width=0, elem_classes="settings"):
            presets = _build_settings(fields, form, folds, purpose, card)
    parts |= {
        "marks": gr.State({}),
        "strict": gr.State(False),
        "started": gr.State(None),
        "estimated_for": gr.State(None),
        "alternative_changes": gr.State([]),
        "length_filled": gr.State(None),
        "card_applied": gr.State(None),
        "num_cards": gr.State(0),
        "remembered": gr.BrowserState({}, storage_key="fluxgui-form", secret="fluxgui"),
    }
    tab = TrainTab(fields, form, parts, presets, tuple(folds), gpu)
    _connect(tab, start=start, estimate=estimate, find=buttons[0], demo_files=buttons[1])
    return tab


def _build_model(
    fields: Fields, form: Form, parts: Parts, folds: list[tuple[frozenset[str], gr.Accordion]]
) -> tuple[gr.Button, gr.Button]:
    """Gives the buttons that find files and that take the demo's."""
    with gr.Column(elem_classes="card"):
        html_part(train_view.title(say("train.model"), say("train.model_help")))
        parts["model_none"] = html_part(elem_id="model-none")
        with gr.Row():
            find = gr.Button(say("train.find_models"), size="sm", min_width=140, elem_id="find-models")
            parts["to_models"] = gr.Button(say("models.choose"), size="sm", min_width=140, elem_id="to-models")
            demo_files = gr.Button(say("train.use_demo"), size="sm", min_width=140, elem_id="use-demo")
        form |= build_fields(MODELS[:2], fields) | build_fields(MODELS[2:], fields)
        with gr.Accordion(say("train.tokenizers"), open=False) as tokenizers:
            form |= build_fields(TOKENIZERS, fields)
    folds.append((frozenset(TOKENIZERS), tokenizers))
    return find, demo_files


def _build_pictures(fields: Fields, form: Form, parts: Parts) -> None:
    with gr.Column(elem_classes="card"):
        html_part(train_view.title(say("train.pictures"), say("train.pictures_help")))
        parts["pictures_none"] = html_part(elem_id="pictures-none")
        form |= build_fields(("image_dir",), fields)
        parts["drop"] = gr.File(
            file_count="multiple",
            file_types=[*IMAGE_SUFFIXES, CAPTION_SUFFIX],
            label=say("train.drop", number=MAX_FILES),
            height=140,
            elem_id="drop-pictures",
        )
        parts["upload"] = html_part(elem_id="upload-result")
        parts["pictures"] = html_part(elem_id="pictures")
        parts["look_after"] = gr.Button(say("dataset.look_after"), size="sm", elem_id="look-after-pictures")
        form |= build_fields(("trigger_word",), fields)


def _build_go(fields: Fields, form: Form, parts: Parts, gpu: Gpu | None) -> tuple[gr.Radio, gr.Dropdown]:
    with gr.Column(elem_classes="card"):
        html_part(train_view.title(say("train.go"), say("train.go_help")))
        purpose = build_purpose()
        parts["purpose_about"] = html_part(elem_id="purpose-about")
        seen = say("train.card_seen", name=gpu.name) if gpu is not None else say("train.card_none")
        html_part(f'<p class="empty">{escape(seen)}</p>', elem_id="card-seen")
        card = build_card()
        parts["length_choice"] = gr.Radio(
            [(say(f"train.length_{length}"), length) for length in LENGTHS],
            value=USUAL_LENGTH,
            label=say("train.length"),
            info=say("train.length_help"),
            elem_id="train-length",
        )
        parts["length"] = html_part(elem_id="length")
        form |= build_fields(LENGTH[:1], fields) | build_fields(SAMPLES[:1], fields)
    return purpose, card


def _build_start(parts: Parts) -> gr.Button:
    with gr.Column(elem_classes="card"):
        html_part(train_view.title(say("train.start_title")))
        parts["problems"] = html_part(elem_id="problems")
        return gr.Button(say("train.start"), variant="primary", elem_id="start")


def _build_memory(parts: Parts, gpu: Gpu | None) -> gr.Button:
    with gr.Column(elem_classes="card"):
        html_part(train_view.title(say("train.memory_title")))
        with gr.Row(elem_classes="fields"):
            parts["vram_gb"] = gr.Number(
                gpu.gigabytes if gpu is not None else USUAL_GB,
                label=say("train.vram"),
                info=say("train.vram_help"),
                min_width=120,
                elem_id="vram-gb",
            )
            parts["ram_gb"] = gr.Number(
                round(psutil.virtual_memory().total / 2**30, 1),
                label=say("train.ram"),
                info=say("train.ram_help"),
                min_width=120,
                elem_id="ram-gb",
            )
        estimate = gr.Button(say("train.estimate"), elem_id="estimate")
        parts["estimate_is_old"] = html_part(elem_id="estimate-is-old")
        parts["estimate"] = html_part(
            f'<p class="empty">{escape(say("train.estimate_first"))}</p>', elem_id="estimate-result"
        )
        parts["alternatives"] = gr.Radio(
            [],
            label=say("train.alternatives"),
            info=say("train.alternatives_help"),
            visible=False,
            elem_id="estimate-alternatives",
        )
    with gr.Accordion(say("train.files"), open=False):
        copied: dict[str, Any] = {"interactive": False, "buttons": ["copy"], "max_lines": 18, "lines": 3}
        parts["preview_command"] = gr.Textbox(label=say("train.command_line"), elem_id="preview-command", **copied)
        parts["preview_config"] = gr.Textbox(label="config.toml", elem_id="preview-config", **copied)
        parts["preview_dataset"] = gr.Textbox(label="dataset.toml", elem_id="preview-dataset", **copied)
    return estimate


def _build_settings(
    fields: Fields,
    form: Form,
    folds: list[tuple[frozenset[str], gr.Accordion]],
    purpose: gr.Radio,
    card: gr.Dropdown,
) -> PresetsBar:
    with gr.Column(elem_classes="card"):
        html_part(train_view.title(say("train.settings"), say("train.settings_help")))
        presets = build_presets_bar(purpose, card)
        form |= build_fields((*LENGTH[1:], "num_repeats"), fields)
        form |= build_fields(LEARNING, fields)
        form |= build_fields(SAMPLES[1:], fields)
        form |= build_fields(SAVING, fields)
        with gr.Accordion(say("train.memory"), open=True) as memory:
            form |= build_fields(MEMORY, fields)
        with gr.Accordion(say("train.more"), open=False) as more:
            for heading, names in (
                (say("train.optimizer"), OPTIMIZER),
                (say("train.flow"), FLOW),
                (say("train.buckets"), BUCKETS),
                (say("train.device"), OTHER[:1]),
            ):
                html_part(f"<h4>{escape(heading)}</h4>")
                form |= build_fields(names, fields)
        with gr.Accordion(say("options.title"), open=False, elem_id="all-options") as everything:
            gr.HTML(all_options_html(), js_on_load=script(), elem_classes="part")
            form |= build_fields(OTHER[1:], fields)
    folds += [(frozenset(MEMORY), memory), (MORE_NAMES, more), (frozenset(OTHER[1:]), everything)]
    return presets


def _connect(tab: TrainTab, *, start: gr.Button, estimate: gr.Button, find: gr.Button, demo_files: gr.Button) -> None:
    form, parts, bar = tab.form, tab.parts, tab.presets
    whole_form, outputs = tab.inputs, tab.outputs
    gr.on(
        [_changed(component) for component in (*form.values(), parts["vram_gb"], parts["ram_gb"])],
        tab.check,
        whole_form,
        outputs,
        trigger_mode="always_last",
        **IN_ORDER,
    )
    image_dir, drop, length = form["image_dir"], parts["drop"], parts["length_choice"]
    assert isinstance(image_dir, gr.Textbox)
    assert isinstance(drop, gr.File)
    assert isinstance(length, gr.Radio)
    image_dir.change(tab.look_at_pictures, [image_dir], [parts["pictures"]], trigger_mode="always_last", **QUIETLY)
    everything = [*form.values(), *parts.values()]

    def estimate_after(event: Callable[..., Dependency]) -> Dependency:
        # A press that comes while an answer is under way counts: it may be about other settings.
        return event(tab.estimate, whole_form, everything, show_progress="minimal", trigger_mode="always_last")

    alternatives = parts["alternatives"]
    assert isinstance(alternatives, gr.Radio)
    used = alternatives.input(
        tab.use_alternative,
        [alternatives, parts["alternative_changes"], form["more_options"]],
        [*form.values()],
        **QUIETLY,
    )
    num_cards = parts["num_cards"]
    assert isinstance(num_cards, gr.State)
    card = [bar.card, form["resolution"], parts["card_applied"], num_cards]
    bar.card.input(tab.apply_card, card, everything, **QUIETLY)
    fills = [
        drop.upload(tab.upload, {*whole_form, drop}, everything, show_progress="minimal"),
        find.click(tab.fill_from_models_folder, whole_form, [*form.values()], **QUIETLY),
        demo_files.click(tab.fill_with_demo, None, [*form.values()], show_progress="minimal"),
        length.input(tab.set_length, whole_form, [parts["length_filled"]], **QUIETLY),
        bar.purpose.input(tab.apply_purpose, whole_form, everything, **QUIETLY),
        estimate_after(estimate.click),
        estimate_after(used.success),
        estimate_after(num_cards.change),
        *_connect_presets(tab),
    ]
    # Ticks and choices that the program fills in are not the user's input.
    for filled in fills:
        filled.then(tab.check, whole_form, outputs, **IN_ORDER)
    start.click(tab.start, whole_form, outputs, show_progress="minimal", concurrency_limit=1).then(
        None, None, None, js=TO_FIRST_PROBLEM
    )


def _changed(component: Component) -> Callable[..., Any]:
    """The event after which the form is checked. A text box's own input event leaves out pasting and deleting."""
    if isinstance(component, gr.Textbox):
        return component.change
    return component.input  # pyright: ignore[reportAttributeAccessIssue] - events are added when a class is made


def _connect_presets(tab: TrainTab) -> list[Dependency]:
    """Connect the user's own presets. Gives the events that fill the form."""
    bar = tab.presets
    saved = [bar.own, bar.name, *bar.replacing.outputs]
    bar.save.click(tab.ask_to_save, {*tab.inputs, bar.name}, saved, **QUIETLY)
    bar.replacing.yes.click(tab.replace_preset, {*tab.inputs, bar.replacing.subject}, saved, **QUIETLY)
    bar.delete.click(tab.ask_to_delete, [bar.own], bar.deleting.outputs, **QUIETLY)
    bar.deleting.yes.click(tab.delete_preset, [bar.deleting.subject], [bar.own, bar.deleting.box], **QUIETLY)
    return [bar.load.click(tab.load_preset, [bar.own], tab.taken_over, **QUIETLY)]
