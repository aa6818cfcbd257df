"""The Train page: what to train with, on what, and how; checked at every change, started with one button.

Components are kept by the name of their option. gradio hands a handler the values by component, `TrainTab.values` turns
them into values by name, and from there on nothing knows of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import gradio as gr
import psutil
from gradio.blocks import Block, BlockContext
from gradio.components import Component
from gradio.events import Dependency

from fluxgui import train_view
from fluxgui.all_options import all_options_html, script
from fluxgui.demo import demo_form_values, make_demo
from fluxgui.fields import (
    BUCKETS,
    FLOW,
    LEARNING,
    LENGTH,
    MEMORY,
    MODELS,
    NOT_IN_PRESETS,
    OPTIMIZER,
    OTHER,
    SAMPLES,
    SAVING,
    TOKENIZERS,
    Field,
    make_fields,
)
from fluxgui.form import Reading, preset_values, read_form, typed_value
from fluxgui.form_parts import build_fields, component_value, html_part, mark
from fluxgui.language import say
from fluxgui.memory_plan import plan_memory
from fluxgui.models import found_models, recognised, remember_models
from fluxgui.pictures import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    MAX_FILES,
    broken_pictures,
    check_folder,
    take_in,
    thumbnails,
    upload_folder_name,
)
from fluxgui.presets import delete_own, preset_form_values, presets_of_kind, save_own
from fluxgui.presets_bar import PresetsBar, build_presets_bar, choices
from fluxgui.runs import create_and_start
from fluxgui.vram import Gpu
from trainer.schema.base import Problem, UserError
from trainer.schema.folders import models_dir

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
IN_ORDER: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_id": "check", "concurrency_limit": 1}
"""For the check of the form: an answer to older values never comes after one to newer values."""
NUM_THUMBNAILS: Final = 12
NUM_DECODED: Final = 300
"""Pictures that are decoded while the page waits; the trainer looks at all of them."""

Data = Mapping[Component, Any]
Updates = dict[Block, Any]
Element = Component | BlockContext
Marks = dict[str, str]
"""What is shown at a field instead of its help: "!" and a problem, or "=" and what was recognised."""


@dataclass(frozen=True)
class TrainTab:
    """The page's components: `form` by field name, `parts` for everything else."""

    fields: Mapping[str, Field]
    form: Mapping[str, Component]
    parts: Mapping[str, Component]
    presets: PresetsBar
    folds: tuple[tuple[frozenset[str], gr.Accordion], ...]
    """Parts of the form that can be closed, with the names of the fields inside."""

    @property
    def inputs(self) -> set[Any]:
        """Components whose values every handler of the form takes."""
        return {*self.form.values(), *(self.parts[name] for name in ("marks", "strict", "vram_gb", "estimated_for"))}

    @property
    def outputs(self) -> list[Element]:
        return [*self.form.values(), *self.parts.values(), *(fold for _, fold in self.folds)]

    def values(self, data: Data) -> dict[str, object]:
        """The form's values by field name."""
        return {name: data[component] for name, component in self.form.items()}

    def fill(self, values: Mapping[str, object]) -> Updates:
        """Updates that put `values` (by field name) into the form; fields that are not named stay."""
        return {
            self.form[name]: gr.update(value=component_value(self.fields[name], value))
            for name, value in values.items()
            if name in self.form
        }

    def check(self, data: Data) -> Updates:
        """Check the form and show the result: problems, marks at fields, length, reading. Also remembers the values."""
        values = self.values(data)
        return {**self.show(read_form(values), values, data), self.parts["remembered"]: values}

    def show(self, reading: Reading, values: Mapping[str, object], data: Data) -> Updates:
        parts = self.parts
        marks = self._marks(reading, values, strict=data[parts["strict"]])
        shown: Marks = data[parts["marks"]]
        updates: Updates = {
            self.form[name]: mark(self.fields[name], marks.get(name, ""))
            for name in self.form
            if marks.get(name, "") != shown.get(name, "")
        }
        for names, fold in self.folds:
            # A problem in a closed part would be invisible. Opened once for it, the part can be closed again.
            if any(marks.get(name, "")[:1] == "!" and name not in shown for name in names):
                updates[fold] = gr.update(open=True)
        estimated_for = data[parts["estimated_for"]]
        is_old = estimated_for is not None and estimated_for != _estimated_for(values, data[parts["vram_gb"]])
        return updates | {
            parts["marks"]: marks,
            parts["estimate_is_old"]: train_view.ESTIMATE_IS_OLD if is_old else "",
            parts["problems"]: train_view.problems(reading, {name: field.label for name, field in self.fields.items()}),
            parts["length"]: train_view.length(reading, num_repeats=_whole_number(values["num_repeats"])),
            parts["preview_command"]: reading.command_line,
            parts["preview_config"]: reading.config_toml,
            parts["preview_dataset"]: reading.dataset_toml,
        }

    def _marks(self, reading: Reading, values: Mapping[str, object], *, strict: bool) -> Marks:
        """Problems and recognitions by field. Empty fields are no problem before the first press of Start."""
        paths = {name: typed_value(self.fields[name], values[name]) for name in MODELS}
        good = recognised({name: path for name, path in paths.items() if isinstance(path, Path)})
        marks = {name: f"={text}" for name, text in good.items()}
        if strict:
            marks |= {name: f"!Needed: {train_view.missing_text(name)}." for name in reading.missing}
        return marks | {name: f"!{text}" for name, text in reading.problem_by_field.items()}

    def look_at_pictures(self, image_dir: str) -> str:
        path = typed_value(self.fields["image_dir"], image_dir)
        if not isinstance(path, Path):
            return ""
        folder = check_folder(path)
        if isinstance(folder, Problem):
            return ""  # the check of the form shows it at the field
        broken = broken_pictures(folder.images[:NUM_DECODED])
        return train_view.pictures(folder, thumbnails(folder.images[:NUM_THUMBNAILS]), broken)

    def upload(self, data: Data) -> Updates:
        files = [Path(path) for path in data[self.parts["drop"]] or []]
        if not files:
            return {}
        current = typed_value(self.fields["image_dir"], data[self.form["image_dir"]])
        wanted = str(data[self.form["output_name"]] or "pictures")
        name = upload_folder_name(current if isinstance(current, Path) else None, wanted)
        try:
            result = take_in(files, name)
        except OSError as error:
            raise gr.Error(f"The pictures cannot be stored: {error}", print_exception=False) from None
        return {
            self.form["image_dir"]: str(result.folder),
            self.parts["upload"]: train_view.upload(
                result.num_images, result.num_captions, str(result.folder), result.refused
            ),
            self.parts["pictures"]: self.look_at_pictures(str(result.folder)),
            self.parts["drop"]: None,
        }

    def estimate(self, data: Data) -> Updates:
        """Estimate the peak for the form's settings and put the smallest fitting `blocks_to_swap` into the form."""
        values = self.values(data)
        estimated_for = _estimated_for(values, data[self.parts["vram_gb"]])
        plan = plan_memory(read_form(values), vram_gb=data[self.parts["vram_gb"]])
        if isinstance(plan, str):
            return {self.parts["estimate"]: train_view.cannot_estimate(plan), self.parts["estimated_for"]: None}
        host = psutil.virtual_memory().total
        return {
            self.parts["estimate"]: train_view.estimate(plan.estimate, vram_bytes=plan.vram_bytes, host_bytes=host),
            self.form["blocks_to_swap"]: plan.estimate.blocks_to_swap,
            self.parts["estimated_for"]: {**estimated_for, "blocks_to_swap": str(plan.estimate.blocks_to_swap)},
        }

    def start(self, data: Data) -> Updates:
        """Start a run, or show what keeps it from starting."""
        values = self.values(data)
        reading = _without_broken_pictures(read_form(values))
        job = reading.job
        if job is None:
            gr.Warning(f"Not started: {_first_reason(reading)}")
            strict = {**data, self.parts["strict"]: True}
            return {**self.show(reading, values, strict), self.parts["strict"]: True}
        try:
            run = create_and_start(
                job.name,
                config_toml=job.config_toml,
                dataset_toml=job.dataset_toml,
                sample_prompts=job.sample_prompts,
                info={},
            )
        except (OSError, UserError) as error:
            raise gr.Error(f"The run cannot be started: {error}", print_exception=False) from None
        remember_models({name: typed_value(self.fields[name], values[name]) for name in MODELS})
        return {self.parts["started"]: run.path.name, self.parts["strict"]: False}

    def fill_from_models_folder(self, data: Data) -> Updates:
        found = found_models(models_dir())
        empty = {name: path for name, path in found.items() if not str(data[self.form[name]] or "").strip()}
        if not empty:
            gr.Info(f"Nothing new was found in {models_dir()}.")
        return self.fill({name: str(path) for name, path in empty.items()})

    def fill_with_demo(self) -> Updates:
        try:
            make_demo()
            return self.fill(demo_form_values())
        except (OSError, UserError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def apply_preset(self, name: str | None) -> Updates:
        """Put a built-in preset's values into the form; what it does not name stays."""
        values = _preset(name)
        updates = self.fill(values)
        if "vram_gb" in values:
            updates[self.parts["vram_gb"]] = gr.update(value=values["vram_gb"])
        return updates

    def load_preset(self, name: str | None) -> Updates:
        """Make the form equal to one of the user's presets: what was empty when it was saved is emptied."""
        values = _preset(name)
        return self.fill({field: values.get(field) for field in self.form if field not in NOT_IN_PRESETS})

    def ask_to_save(self, data: Data) -> Updates:
        """Save under a new name at once; ask before a preset of that name is replaced."""
        bar = self.presets
        name = str(data[bar.name] or "").strip()
        if name in {preset.name for preset in presets_of_kind("own")}:
            return bar.replacing.ask(f"Replace the preset {name}? The settings that it holds now are lost.", name)
        return self._save_preset(name, data)

    def replace_preset(self, data: Data) -> Updates:
        return self._save_preset(data[self.presets.replacing.subject], data)

    def _save_preset(self, name: str, data: Data) -> Updates:
        bar = self.presets
        try:
            saved = save_own(name, preset_values(self.values(data)))
        except (OSError, UserError) as error:
            raise gr.Error(f"The preset was not saved: {error}", print_exception=False) from None
        gr.Info(f"Saved as {saved}.")
        return {
            bar.own: gr.update(choices=choices("own"), value=saved),
            bar.name: "",
            bar.replacing.box: gr.update(visible=False),
        }

    def ask_to_delete(self, name: str | None) -> Updates:
        if not name:
            raise gr.Error("Choose a saved preset first.", print_exception=False)
        return self.presets.deleting.ask(say("presets.ask_to_delete", name=name), name)

    def delete_preset(self, name: str | None) -> Updates:
        bar = self.presets
        try:
            delete_own(name or "")
        except (OSError, UserError) as error:
            gr.Warning(f"Not deleted: {error}")
        return {bar.own: gr.update(choices=choices("own"), value=None), bar.deleting.box: gr.update(visible=False)}


def _without_broken_pictures(reading: Reading) -> Reading:
    """The reading, with a problem and no job when pictures are broken: the trainer would refuse them a little later.

    They have been decoded when the folder was chosen, so that this takes no time.
    """
    broken = broken_pictures(reading.pictures.images[:NUM_DECODED]) if reading.pictures is not None else []
    if reading.pictures is None or not broken:
        return reading
    names = "; ".join(broken[: train_view.NAMES_SHOWN])
    more = f" and {len(broken) - train_view.NAMES_SHOWN} more" if len(broken) > train_view.NAMES_SHOWN else ""
    problem = Problem(
        f"these pictures cannot be used: {names}{more}",
        str(reading.pictures.path),
        "Replace or remove them.",
        field="image_dir",
    )
    return replace(reading, problems=(*reading.problems, problem), job=None)


def _estimated_for(values: Mapping[str, object], vram_gb: object) -> dict[str, object]:
    """What an estimate depends on: everything that a preset keeps, the model files, and the card."""
    return {
        **{name: values[name] for name in values if name in MODELS or name not in NOT_IN_PRESETS},
        "vram_gb": vram_gb,
    }


def _whole_number(value: object) -> int:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else 1


def _preset(name: str | None) -> dict[str, object]:
    if not name:
        raise gr.Error("Choose a preset first.", print_exception=False)
    try:
        return preset_form_values(name)
    except (OSError, UserError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def _first_reason(reading: Reading) -> str:
    if reading.problems:
        return reading.problems[0].what
    return f"{train_view.missing_text(reading.missing[0])} is missing."


MORE_NAMES: Final = frozenset({*OPTIMIZER, *FLOW, *BUCKETS, *OTHER[:1]})


def build_train_tab(gpu: Gpu | None) -> TrainTab:
    """Lay the page out and connect it. Call inside a `gr.Tab`. `started` changes when a run was started."""
    fields = make_fields()
    form: dict[str, Component] = {}
    parts: dict[str, Component] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=540):
            with gr.Column(elem_classes="card"):
                html_part(
                    train_view.title("1 · Model", "Four files in the .safetensors format; each is recognised at once.")
                )
                form |= build_fields(MODELS[:2], fields) | build_fields(MODELS[2:], fields)
                with gr.Row():
                    find = gr.Button("Look in the models folder", size="sm", elem_id="find-models")
                    parts["to_models"] = gr.Button(say("models.choose"), size="sm", elem_id="to-models")
                    demo_files = gr.Button("Use the demo's files", size="sm", elem_id="use-demo")
                with gr.Accordion("Tokenizers", open=False) as tokenizers:
                    form |= build_fields(TOKENIZERS, fields)
            with gr.Column(elem_classes="card"):
                html_part(train_view.title("2 · Pictures"))
                form |= build_fields(("image_dir",), fields)
                parts["drop"] = gr.File(
                    file_count="multiple",
                    file_types=[*IMAGE_SUFFIXES, CAPTION_SUFFIX],
                    label=f"Or drop pictures and captions here (up to {MAX_FILES} files)",
                    height=140,
                    elem_id="drop-pictures",
                )
                parts["upload"] = html_part(elem_id="upload-result")
                parts["pictures"] = html_part(elem_id="pictures")
                parts["look_after"] = gr.Button(say("dataset.look_after"), size="sm", elem_id="look-after-pictures")
                form |= build_fields(("trigger_word", "num_repeats"), fields)
            with gr.Column(elem_classes="card"):
                html_part(train_view.title("3 · Training"))
                presets = build_presets_bar()
                form |= build_fields(LENGTH, fields)
                parts["length"] = html_part(elem_id="length")
                form |= build_fields(LEARNING, fields)
                form |= build_fields(SAMPLES[:1], fields) | build_fields(SAMPLES[1:], fields)
                form |= build_fields(SAVING, fields)
                with gr.Accordion("Memory", open=True) as memory:
                    form |= build_fields(MEMORY, fields)
                with gr.Accordion("More settings", open=False) as more:
                    for heading, names in (
                        ("Optimizer", OPTIMIZER),
                        ("Timesteps and loss", FLOW),
                        ("Sizes and captions", BUCKETS),
                        (say("train.device"), OTHER[:1]),
                    ):
                        html_part(f"<h4>{heading}</h4>")
                        form |= build_fields(names, fields)
                with gr.Accordion(say("options.title"), open=False, elem_id="all-options") as everything:
                    gr.HTML(all_options_html(), js_on_load=script(), elem_classes="part")
                    form |= build_fields(OTHER[1:], fields)
        with gr.Column(scale=3, min_width=300, elem_classes="side"):
            with gr.Column(elem_classes="card"):
                html_part(train_view.title("Start"))
                parts["problems"] = html_part(elem_id="problems")
                start = gr.Button("Start training", variant="primary", elem_id="start")
            with gr.Column(elem_classes="card"):
                seen = f"Detected: {gpu.name}." if gpu is not None else "No NVIDIA GPU was detected."
                html_part(train_view.title("Memory", seen))
                parts["vram_gb"] = gr.Number(
                    gpu.gigabytes if gpu is not None else 24,
                    label="GPU memory (GB)",
                    info="Of the card that trains.",
                    elem_id="vram-gb",
                )
                estimate = gr.Button("Estimate VRAM and pick blocks_to_swap", elem_id="estimate")
                parts["estimate_is_old"] = html_part(elem_id="estimate-is-old")
                parts["estimate"] = html_part(elem_id="estimate-result")
            with gr.Accordion("Files and command line", open=False):
                copied: dict[str, Any] = {"interactive": False, "buttons": ["copy"], "max_lines": 18, "lines": 3}
                parts["preview_command"] = gr.Textbox(label="Command line", elem_id="preview-command", **copied)
                parts["preview_config"] = gr.Textbox(label="config.toml", elem_id="preview-config", **copied)
                parts["preview_dataset"] = gr.Textbox(label="dataset.toml", elem_id="preview-dataset", **copied)
    parts |= {
        "marks": gr.State({}),
        "strict": gr.State(False),
        "started": gr.State(None),
        "estimated_for": gr.State(None),
        "remembered": gr.BrowserState({}, storage_key="fluxgui-form", secret="fluxgui"),
    }
    folds = (
        (frozenset(TOKENIZERS), tokenizers),
        (frozenset(MEMORY), memory),
        (MORE_NAMES, more),
        (frozenset(OTHER[1:]), everything),
    )
    tab = TrainTab(fields, form, parts, presets, folds)
    _connect(tab, start=start, estimate=estimate, find=find, demo_files=demo_files)
    return tab


def _connect(tab: TrainTab, *, start: gr.Button, estimate: gr.Button, find: gr.Button, demo_files: gr.Button) -> None:
    form, parts = tab.form, tab.parts
    whole_form = tab.inputs
    outputs = tab.outputs

    gr.on(
        [_changed(component) for component in (*form.values(), parts["vram_gb"])],
        tab.check,
        whole_form,
        outputs,
        trigger_mode="always_last",
        **IN_ORDER,
    )
    image_dir = form["image_dir"]
    assert isinstance(image_dir, gr.Textbox)
    image_dir.change(tab.look_at_pictures, [image_dir], [parts["pictures"]], trigger_mode="always_last", **QUIETLY)
    drop = parts["drop"]
    assert isinstance(drop, gr.File)
    fills = [
        drop.upload(tab.upload, {*whole_form, drop}, [*form.values(), *parts.values()], show_progress="minimal"),
        find.click(tab.fill_from_models_folder, whole_form, [*form.values()], **QUIETLY),
        demo_files.click(tab.fill_with_demo, None, [*form.values()], show_progress="minimal"),
        # A press that comes while an answer is under way counts: it may be about other settings.
        estimate.click(
            tab.estimate,
            whole_form,
            [form["blocks_to_swap"], parts["estimate"], parts["estimated_for"]],
            show_progress="minimal",
            trigger_mode="always_last",
        ),
        *_connect_presets(tab),
    ]
    # Ticks and choices that the program fills in are not the user's input.
    for filled in fills:
        filled.then(tab.check, whole_form, outputs, **IN_ORDER)
    start.click(tab.start, whole_form, outputs, show_progress="minimal", concurrency_limit=1)


def _changed(component: Component) -> Callable[..., Any]:
    """The event after which the form is checked. A text box's own input event leaves out pasting and deleting."""
    if isinstance(component, gr.Textbox):
        return component.change
    return component.input  # pyright: ignore[reportAttributeAccessIssue] - events are added when a class is made


def _connect_presets(tab: TrainTab) -> list[Dependency]:
    """Connect the bar. Gives the events that fill the form."""
    bar = tab.presets
    fields = [*tab.form.values()]
    saved = [bar.own, bar.name, *bar.replacing.outputs]
    bar.save.click(tab.ask_to_save, {*tab.inputs, bar.name}, saved, **QUIETLY)
    bar.replacing.yes.click(tab.replace_preset, {*tab.inputs, bar.replacing.subject}, saved, **QUIETLY)
    bar.delete.click(tab.ask_to_delete, [bar.own], bar.deleting.outputs, **QUIETLY)
    bar.deleting.yes.click(tab.delete_preset, [bar.deleting.subject], [bar.own, bar.deleting.box], **QUIETLY)
    applied = [*fields, tab.parts["vram_gb"]]
    return [
        bar.purpose.input(tab.apply_preset, [bar.purpose], applied, **QUIETLY),
        bar.card.input(tab.apply_preset, [bar.card], applied, **QUIETLY),
        bar.load.click(tab.load_preset, [bar.own], fields, **QUIETLY),
    ]
