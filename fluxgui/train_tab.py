"""The Train page: what to train with, on what, and how; checked at every change, started with one button.

Components are kept by the name of their option. gradio hands a handler the values by component, `TrainTab.values` turns
them into values by name, and from there on nothing knows of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gradio as gr
from gradio.blocks import Block, BlockContext
from gradio.components import Component

from fluxgui import memory_view, train_length, train_view
from fluxgui.datasets import take_in
from fluxgui.demo import demo_form_values, make_demo
from fluxgui.fields import MODELS, NOT_IN_PRESETS, Field, option_field
from fluxgui.form import Reading, preset_values, read_form, typed_value
from fluxgui.form_parts import NOTHING, component_value, mark
from fluxgui.language import say
from fluxgui.memory_plan import plan_memory
from fluxgui.models import found_models, recognised, remember_models
from fluxgui.pictures import broken_pictures, check_folder, thumbnails, upload_folder_name
from fluxgui.presets import USUAL_START, delete_own, preset_form_values, presets_of_kind, save_own, start_values
from fluxgui.presets_bar import PresetsBar, card_preset, choices
from fluxgui.runs import create_and_start
from fluxgui.train_values import (
    NUM_DECODED,
    any_given,
    first_reason,
    not_larger,
    whole_number,
    with_options,
    without_broken_pictures,
)
from fluxgui.vram import Gpu
from trainer.schema.base import Problem, UserError
from trainer.schema.folders import models_dir
from trainer.schema.memory_plan import Plan
from trainer.schema.settings import read_settings

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
IN_ORDER: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_id": "check", "concurrency_limit": 1}
"""For the check of the form: an answer to older values never comes after one to newer values."""
USUAL_LENGTH: Final = "normal"
QUICK_TEST: Final = "quick-test"
"""The purpose that has a length of its own."""
NUM_THUMBNAILS: Final = 12

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
    gpu: Gpu | None

    @property
    def inputs(self) -> set[Any]:
        """Components whose values every handler of the form takes."""
        beside = ("marks", "strict", "vram_gb", "ram_gb", "estimated_for", "length_choice", "length_filled")
        return {*self.form.values(), *(self.parts[name] for name in beside), self.presets.purpose, self.presets.card}

    @property
    def arrival(self) -> list[Element]:
        """What `arrive` updates."""
        beside = ("length_choice", "length_filled", "vram_gb", "ram_gb", "card_applied")
        return [*self.form.values(), *(self.parts[name] for name in beside), self.presets.purpose, self.presets.card]

    @property
    def outputs(self) -> list[Element]:
        return [*self.form.values(), *self.parts.values(), *(fold for _, fold in self.folds)]

    @property
    def taken_over(self) -> list[Element]:
        """What `take_over` and `apply_preset` update."""
        beside = (self.parts[name] for name in ("length_choice", "card_applied", "vram_gb"))
        return [*self.form.values(), *beside, self.presets.purpose, self.presets.card]

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

    def take_over(self, values: Mapping[str, object]) -> Updates:
        """Put settings from elsewhere into the form as they are: the answers beside it no longer change any of them."""
        answers = (self.parts["length_choice"], self.parts["card_applied"], self.presets.purpose, self.presets.card)
        return {**self.fill(values), **dict.fromkeys(answers)}

    def arrive(self, remembered: Mapping[str, object] | None) -> Updates:
        """The form as this browser left it, with the answers beside it; on the first visit as the machine suggests."""
        bar, parts = self.presets, self.parts
        if remembered:
            answers = remembered.get("beside the form")
            kept: Mapping[str, Any] = answers if isinstance(answers, dict) else {}
            return {
                **self.fill(remembered),
                parts["length_choice"]: kept.get("length"),
                parts["length_filled"]: kept.get("filled"),
                bar.purpose: kept.get("purpose"),
                bar.card: kept.get("card"),
                parts["card_applied"]: kept.get("card"),
                **{parts[name]: kept[name] for name in ("vram_gb", "ram_gb") if name in kept},
            }
        start = read_settings().start_preset or USUAL_START
        purpose = start if start in train_view.PURPOSES else None
        values = start_values()
        # The user's own start preset says how long, and for which card.
        card = card_preset(self.gpu.gigabytes) if self.gpu is not None and purpose is not None else None
        return {
            **self.fill({**values, **(not_larger(card.values, values.get("resolution")) if card is not None else {})}),
            parts["length_choice"]: USUAL_LENGTH if purpose is not None else None,
            bar.purpose: purpose,
            bar.card: card.name if card is not None else None,
            parts["card_applied"]: card.name if card is not None else None,
        }

    def check(self, data: Data) -> Updates:
        """Check the form and show the result: problems, marks at fields, length, reading. Also remembers the values.

        The length of training follows the pictures, unless it was set by hand.
        """
        values, parts = self.values(data), self.parts
        reading = read_form(values)
        num_pictures = len(reading.pictures.images) if reading.pictures is not None else 0
        length, filled, changes = train_length.follow(
            data[parts["length_choice"]],
            values,
            data[parts["length_filled"]],
            num_pictures=num_pictures,
            num_draws=reading.num_draws,
        )
        values |= changes
        updates = self.show(read_form(values) if changes else reading, values, data)
        for name, value in changes.items():
            updates[self.form[name]] = {**updates.get(self.form[name], {}), **gr.update(value=value)}
        return {
            **updates,
            # Only what changed: the user may have answered otherwise before this answer arrives.
            **{
                parts[name]: value
                for name, value in (("length_choice", length), ("length_filled", filled))
                if value != data[parts[name]]
            },
            parts["purpose_about"]: train_view.purpose(data[self.presets.purpose]),
            parts["remembered"]: {
                **values,
                "beside the form": {
                    "length": length,
                    "filled": filled,
                    "purpose": data[self.presets.purpose],
                    "card": data[self.presets.card],
                    "vram_gb": data[parts["vram_gb"]],
                    "ram_gb": data[parts["ram_gb"]],
                },
            },
        }

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
        is_old = estimated_for is not None and estimated_for != self._estimated_for(values, data)
        return updates | {
            parts["marks"]: marks,
            parts["estimate_is_old"]: memory_view.is_old() if is_old else "",
            parts["model_none"]: train_view.empty_state("model_none") if not any_given(values, MODELS) else "",
            parts["pictures_none"]: train_view.empty_state("pictures_none")
            if not any_given(values, ["image_dir"])
            else "",
            parts["problems"]: train_view.problems(reading, {name: field.label for name, field in self.fields.items()}),
            parts["length"]: train_view.length(reading, num_repeats=whole_number(values["num_repeats"])),
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
            marks |= {name: f"!{say('train.needed', what=train_view.missing_text(name))}" for name in reading.missing}
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
            return NOTHING
        current = typed_value(self.fields["image_dir"], data[self.form["image_dir"]])
        wanted = str(data[self.form["output_name"]] or "pictures")
        name = upload_folder_name(current if isinstance(current, Path) else None, wanted)
        try:
            result = take_in(files, name)
        except OSError as error:
            raise gr.Error(say("train.not_stored", reason=error), print_exception=False) from None
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
        parts, values = self.parts, self.values(data)
        reading = read_form(values)
        plan = plan_memory(reading, vram_gb=data[parts["vram_gb"]], ram_gb=data[parts["ram_gb"]])
        if isinstance(plan, str):
            return {
                parts["estimate"]: memory_view.cannot_estimate(plan),
                parts["estimated_for"]: None,
                parts["alternatives"]: gr.update(visible=False, value=None),
            }
        blocks = str(plan.choice.blocks_to_swap)
        counted = train_view.num_steps(reading, num_repeats=whole_number(values["num_repeats"]))
        accumulation = reading.options.gradient_accumulation_steps if reading.options is not None else 1
        shown = memory_view.plan_html(
            plan, num_steps=counted[1] if counted is not None else None, accumulation=accumulation
        )
        return {
            parts["estimate"]: shown,
            self.form["blocks_to_swap"]: blocks,
            parts["estimated_for"]: self._estimated_for({**values, "blocks_to_swap": blocks}, data),
            parts["estimate_is_old"]: "",
            **self._show_alternatives(plan),
        }

    def _show_alternatives(self, plan: Plan) -> Updates:
        labels = {name: option_field(name).label for other in plan.alternatives for name in other.changes}
        labels |= {name: field.label for name, field in self.fields.items()}
        others = plan.alternatives[: memory_view.NUM_ALTERNATIVES]
        choices = [(memory_view.alternative_text(other, labels), str(number)) for number, other in enumerate(others)]
        return {
            self.parts["alternatives"]: gr.update(choices=choices, value=None, visible=bool(others)),
            self.parts["alternative_changes"]: [dict(other.changes) for other in others],
        }

    def use_alternative(self, number: str | None, changes: list[dict[str, object]], more: str | None) -> Updates:
        """Fill in what the chosen alternative changes; what has no field of its own goes into the lines of more options."""
        if number is None or int(number) >= len(changes):
            return NOTHING
        chosen = changes[int(number)]
        apart = {name: value for name, value in chosen.items() if name not in self.form}
        try:
            lines = with_options(more or "", apart)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {**self.fill(chosen), **({self.form["more_options"]: lines} if apart else {})}

    def set_length(self, data: Data) -> Updates:
        """Let the answer fill in its values, whatever was set by hand before. The check after it does so."""
        values = self.values(data)
        return {self.parts["length_filled"]: {name: values[name] for name in train_length.NAMES}}

    def _estimated_for(self, values: Mapping[str, object], data: Data) -> dict[str, object]:
        """What an estimate depends on: everything that a preset keeps, the files, and the machine."""
        return {
            **{name: values[name] for name in values if name in (*MODELS, "image_dir") or name not in NOT_IN_PRESETS},
            "vram_gb": data[self.parts["vram_gb"]],
            "ram_gb": data[self.parts["ram_gb"]],
        }

    def start(self, data: Data) -> Updates:
        """Start a run, or show what keeps it from starting."""
        values = self.values(data)
        reading = without_broken_pictures(read_form(values))
        job = reading.job
        if job is None:
            gr.Warning(say("train.not_started", reason=first_reason(reading)))
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
            raise gr.Error(say("train.cannot_start", reason=error), print_exception=False) from None
        remember_models({name: typed_value(self.fields[name], values[name]) for name in MODELS})
        return {self.parts["started"]: run.path.name, self.parts["strict"]: False}

    def fill_from_models_folder(self, data: Data) -> Updates:
        found = found_models(models_dir())
        empty = {name: path for name, path in found.items() if not str(data[self.form[name]] or "").strip()}
        if not empty:
            gr.Info(say("train.nothing_found", folder=models_dir()))
        return self.fill({name: str(path) for name, path in empty.items()})

    def fill_with_demo(self) -> Updates:
        try:
            make_demo()
            return self.fill(demo_form_values())
        except (OSError, UserError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def apply_purpose(self, data: Data) -> Updates:
        """Put a purpose's values into the form. A chosen length stays chosen, and its check counts anew."""
        name, parts = data[self.presets.purpose], self.parts
        values = _preset(name)
        updates = self.fill(values)
        if name == QUICK_TEST:
            return {**updates, parts["length_choice"]: None}
        now = {**self.values(data), **{key: component_value(self.fields[key], values[key]) for key in self._of(values)}}
        return {**updates, parts["length_filled"]: {key: now[key] for key in train_length.NAMES}}

    def _of(self, values: Mapping[str, object]) -> list[str]:
        return [name for name in values if name in self.form]

    def apply_card(self, name: str | None, resolution: str | None, applied: str | None, count: int) -> Updates:
        """Put the values for a card into the form; what they do not name stays.

        gradio tells of an input whenever the list is left, so that only another card than before counts.
        """
        parts = self.parts
        if not name or name == applied:
            return NOTHING
        values = _preset(name)
        shown = self.fill(not_larger(values, resolution))
        return {
            **shown,
            parts["vram_gb"]: gr.update(value=values.get("vram_gb")),
            parts["card_applied"]: name,
            parts["num_cards"]: count + 1,
        }

    def load_preset(self, name: str | None) -> Updates:
        """Make the form equal to one of the user's presets: what was empty when it was saved is emptied."""
        values = _preset(name)
        return self.take_over({field: values.get(field) for field in self.form if field not in NOT_IN_PRESETS})

    def apply_preset(self, name: str) -> Updates:
        """Put a built-in preset's values into the form, and show it as the answer that it is."""
        values, bar, parts = _preset(name), self.presets, self.parts
        if name in train_view.PURPOSES:
            return {**self.fill(values), parts["length_choice"]: None, bar.purpose: name}
        vram_gb = values.get("vram_gb")
        if vram_gb is None:
            return self.take_over(values)
        return {
            **self.fill(values),
            bar.card: name,
            parts["card_applied"]: name,
            parts["vram_gb"]: gr.update(value=vram_gb),
        }

    def ask_to_save(self, data: Data) -> Updates:
        """Save under a new name at once; ask before a preset of that name is replaced."""
        bar = self.presets
        name = str(data[bar.name] or "").strip()
        if name in {preset.name for preset in presets_of_kind("own")}:
            return bar.replacing.ask(say("train.ask_to_replace", name=name), name)
        return self._save_preset(name, data)

    def replace_preset(self, data: Data) -> Updates:
        return self._save_preset(data[self.presets.replacing.subject], data)

    def _save_preset(self, name: str, data: Data) -> Updates:
        bar = self.presets
        try:
            saved = save_own(name, preset_values(self.values(data)))
        except (OSError, UserError) as error:
            raise gr.Error(say("train.not_saved", reason=error), print_exception=False) from None
        gr.Info(say("train.saved", name=saved))
        return {
            bar.own: gr.update(choices=choices("own"), value=saved),
            bar.name: "",
            bar.replacing.box: gr.update(visible=False),
        }

    def ask_to_delete(self, name: str | None) -> Updates:
        if not name:
            raise gr.Error(say("train.choose_saved"), print_exception=False)
        return self.presets.deleting.ask(say("presets.ask_to_delete", name=name), name)

    def delete_preset(self, name: str | None) -> Updates:
        bar = self.presets
        try:
            delete_own(name or "")
        except (OSError, UserError) as error:
            gr.Warning(say("train.not_deleted", reason=error))
        return {bar.own: gr.update(choices=choices("own"), value=None), bar.deleting.box: gr.update(visible=False)}


def _preset(name: str | None) -> dict[str, object]:
    if not name:
        raise gr.Error(say("train.choose_preset"), print_exception=False)
    try:
        return preset_form_values(name)
    except (OSError, UserError) as error:
        raise gr.Error(str(error), print_exception=False) from None
