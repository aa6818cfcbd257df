"""The form of all options: everything that is supported can be reached, and no answer is lost on the way to the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import pytest
import tomlkit

from fluxgui.all_options import WRITTEN_BY_THE_PAGE, all_options_html, can_be_set
from fluxgui.fields import ALL_NAMES, make_fields
from fluxgui.form import read_form
from fluxgui.form_parts import component_value
from fluxgui.importing import fill_form
from fluxgui.presets import start_values
from tests.tiny import TinyModels
from trainer.schema.import_project import ImportedProject
from trainer.schema.option_reference import reference_rows
from trainer.schema.options import SECRET_OPTIONS
from trainer.tools.tiny_pictures import make_images

ROWS = {str(row["name"]): row for row in reference_rows()}
HTML = all_options_html()
# Answers that only fit where something else is as they need it, or name files: what the check says of them is told.
OTHER_ANSWERS: Mapping[str, object] = {
    "caption_extension": ".tags",
    "caption_extention": ".tags",
    "network_module": "networks.oft_flux",
    "face_crop_aug_range": "1.0,2.0",
    "base_weights_multiplier": [0.5],
    "optimizer_args": ["weight_decay=0.1"],
    "lr_scheduler_args": ["a=1"],
    "network_args": ["rank_dropout=0.1"],
}

ALIASES = {"caption_extention": "caption_extension", "split_mode": "blocks_to_swap"}
"""Old names, and what the run is told in their place."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("form")
    make_images(folder / "cats", 2)
    values: dict[str, object] = {
        **start_values(),
        "pretrained_model_name_or_path": tiny_models.flux_dev,
        "clip_l": tiny_models.clip_l,
        "t5xxl": tiny_models.t5xxl,
        "ae": tiny_models.ae,
        "clip_l_tokenizer": tiny_models.clip_l_tokenizer,
        "t5xxl_tokenizer": tiny_models.t5xxl_tokenizer,
        "image_dir": folder / "cats",
        "output_name": "mycat",
    }
    return {name: component_value(field, values.get(name, field.default)) for name, field in make_fields().items()}


def answer(row: Mapping[str, object]) -> object:
    name = str(row["name"])
    if name in OTHER_ANSWERS:
        return OTHER_ANSWERS[name]
    if row["type"] == "flag":
        return True
    choices = [choice for choice in cast("list[str]", row["choices"]) if choice != row["default"]]
    if choices:
        return choices[0]
    if row["type"] in ("integer", "steps"):
        return max(1, int(cast("int | None", row["default"]) or 0) + 1)
    if row["type"] == "number":
        return 0.25
    return ["a"] if row["list"] else "a"


def flat(config_toml: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in tomlkit.parse(config_toml).unwrap().items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def test_every_supported_option_can_be_reached() -> None:
    supported = {name for name, row in ROWS.items() if row["status"] == "supported"}
    here = {name for name, row in ROWS.items() if can_be_set(row)}
    assert here | set(ALL_NAMES) | WRITTEN_BY_THE_PAGE | SECRET_OPTIONS >= supported
    assert set(re.findall(r'id="option-(\w+)"', HTML)) == here
    assert set(re.findall(r'data-name="(\w+)"', HTML)) == set(ROWS)
    for name in set(ALL_NAMES) & set(ROWS):
        assert f'href="#field-{name}"' in HTML


def test_what_has_no_effect_says_why() -> None:
    for row in ROWS.values():
        if row["status"] != "supported":
            start = HTML.index(f'data-name="{row["name"]}"')
            assert '<p class="options-note">' in HTML[start : HTML.index("</div>", start)]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if can_be_set(row)])
def test_an_answer_reaches_the_run_or_is_named(name: str, filled: dict[str, object]) -> None:
    value = answer(ROWS[name])
    line = tomlkit.dumps({name: value}).strip()
    reading = read_form({**filled, "more_options": line})
    config = flat(reading.config_toml)
    if reading.problems:
        assert all({problem.field} & {"more_options", name} or name in f"{problem}" for problem in reading.problems)
    elif name in ALIASES:
        assert config[ALIASES[name]] != flat(read_form(filled).config_toml).get(ALIASES[name])
    else:
        assert config[name] == value
        # And back: an import of this config fills the same line in again.
        known = {key: entry for key, entry in config.items() if key == name}
        assert reading.options is not None
        project = ImportedProject(kind="options", options=reading.options, values=known)
        again = fill_form(project).values["more_options"]
        assert again == line


def test_another_network_can_be_chosen(filled: dict[str, object]) -> None:
    reading = read_form({**filled, "more_options": 'network_module = "networks.oft_flux"'})
    assert reading.problems == ()
    assert flat(reading.config_toml)["network_module"] == "networks.oft_flux"


def test_the_page_stays_light() -> None:
    assert len(HTML) < 200_000
