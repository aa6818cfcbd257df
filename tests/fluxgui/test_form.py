"""From what is in the form to the files of a run, and to problems at fields."""

from __future__ import annotations

import random
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import tomlkit

from fluxgui import memory_view
from fluxgui.fields import ALL_NAMES, DATASET_NAMES, NOT_IN_PRESETS, make_fields
from fluxgui.form import preset_values, read_form, typed_value
from fluxgui.form_parts import component_value, shown_number
from fluxgui.importing import fill_form, read_pasted
from fluxgui.memory_plan import plan_memory
from fluxgui.models import recognised
from fluxgui.presets import delete_own, preset_form_values, presets_of_kind, save_own, start_values
from tests.fluxgui.sparse_flux import make_sparse_flux
from tests.tiny import TinyModels
from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.dataset_file import read_dataset_config
from trainer.schema.memory_plan import Plan
from trainer.schema.option_files import read_config_file
from trainer.schema.options import Options
from trainer.tools.tiny_chroma import make_chroma
from trainer.tools.tiny_pictures import make_images

# Answers that go together whatever the others are.
RANDOM_ANSWERS: Mapping[str, tuple[str, ...]] = {
    "output_name": ("mycat", "a b-c", "猫"),
    "trigger_word": ("", "ohwx", "two words", '"quoted"'),
    "num_repeats": ("1", "3", "40"),
    "max_train_epochs": ("", "1", "12"),
    "max_train_steps": ("5", "777"),
    "network_dim": ("1", "4", "128"),
    "network_alpha": ("0.5", "1", "16"),
    "learning_rate": ("1e-4", "0.00035", "1"),
    "resolution": ("64", "128,192", "512"),
    "train_batch_size": ("1", "3"),
    "sample_prompt_lines": ("", "a --w 64", "a\nb --d 1"),
    "sample_every_n_epochs": ("", "2"),
    "sample_every_n_steps": ("", "9"),
    "save_every_n_epochs": ("", "3"),
    "save_every_n_steps": ("", "10"),
    "save_precision": ("", "fp16", "bf16", "float"),
    "mixed_precision": ("no", "bf16"),
    "lr_scheduler": ("constant_with_warmup", "cosine", "linear"),
    "lr_warmup_steps": ("0", "5", "0.25"),
    "max_grad_norm": ("0", "1", "0.3"),
    "gradient_accumulation_steps": ("1", "4"),
    "network_dropout": ("", "0.1"),
    "seed": ("", "0", "42"),
    "timestep_sampling": ("sigma", "uniform", "shift", "flux_shift"),
    "discrete_flow_shift": ("1", "3.1582"),
    "guidance_scale": ("1", "3.5"),
    "loss_type": ("l1", "l2"),  # huber gets a schedule beside it, which then stands in the files
    "caption_dropout_rate": ("0", "0.05"),
    "device": ("auto", "cpu"),
    "more_options": ("", "keep_tokens = 1", 'network_args = ["rank_dropout=0.1"]'),
}
# Off, they forbid one of the other answers.
NEEDED_FLAGS = ("network_train_unet_only", "cache_text_encoder_outputs", "cache_latents", "enable_bucket")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def filled(tmp_path: Path, tiny_models: TinyModels) -> dict[str, object]:
    """A form that can be started, as its components would give it."""
    make_images(tmp_path / "cats", 3)
    fields = make_fields()
    values: dict[str, object] = {
        **start_values(),
        "pretrained_model_name_or_path": tiny_models.flux_dev,
        "clip_l": tiny_models.clip_l,
        "t5xxl": tiny_models.t5xxl,
        "ae": tiny_models.ae,
        "clip_l_tokenizer": tiny_models.clip_l_tokenizer,
        "t5xxl_tokenizer": tiny_models.t5xxl_tokenizer,
        "image_dir": tmp_path / "cats",
        "output_name": "mycat",
        "trigger_word": "ohwx",
        "sample_prompt_lines": "ohwx cat --w 64 --h 64 --s 2\nohwx dog",
    }
    return {name: component_value(field, values.get(name, field.default)) for name, field in fields.items()}


def problem_fields(values: Mapping[str, object]) -> dict[str, str]:
    return read_form(values).problem_by_field


def test_a_filled_form_becomes_a_job(filled: dict[str, object]) -> None:
    reading = read_form(filled)
    assert reading.problems == ()
    assert reading.missing == ()
    assert reading.job is not None
    assert reading.job.name == "mycat"
    assert reading.job.sample_prompts == "ohwx cat --w 64 --h 64 --s 2\nohwx dog\n"


def test_the_job_means_what_the_form_shows(filled: dict[str, object], tmp_path: Path) -> None:
    filled |= {
        "network_dim": "8",
        "learning_rate": "3e-4",
        "resolution": "128",
        "num_repeats": "7",
        "max_train_epochs": "2",
    }
    filled |= {"enable_bucket": True, "min_bucket_reso": "64", "max_bucket_reso": "256", "train_batch_size": "2"}
    job = read_form(filled).job
    assert job is not None
    config, dataset = tmp_path / "config.toml", tmp_path / "dataset.toml"
    config.write_text(job.config_toml, encoding="utf-8")
    dataset.write_text(job.dataset_toml, encoding="utf-8")
    values = read_config_file(config)
    assert (values["network_dim"], values["learning_rate"], values["max_train_epochs"]) == (8, 3e-4, 2)
    assert {"dataset_config", "output_dir", "sample_prompts"} & set(values) == set()
    options = read_form(filled).options
    assert options is not None
    read = read_dataset_config(dataset, options).datasets[0]
    assert tomlkit.parse(job.dataset_toml).unwrap()["datasets"][0]["resolution"] == 128
    assert (read.resolution, read.batch_size, read.enable_bucket) == ((128, 128), 2, True)
    assert (read.min_bucket_reso, read.max_bucket_reso) == (64, 256)
    subset = read.subsets[0]
    assert (subset.num_repeats, subset.caption_extension, subset.caption_prefix) == (7, ".txt", "ohwx")
    assert subset.image_dir == tmp_path / "cats"


@pytest.mark.parametrize("seed", range(20))
def test_form_to_files_to_form_is_the_identity(filled: dict[str, object], seed: int) -> None:
    """Random answers in all boxes that take any: the files of the run fill the same form in again."""
    draw = random.Random(seed)
    for name, field in make_fields().items():
        if name in RANDOM_ANSWERS:
            filled[name] = draw.choice(RANDOM_ANSWERS[name])
        elif field.kind == "flag" and name not in NEEDED_FLAGS:
            filled[name] = draw.random() < 0.5
    if filled["max_train_epochs"]:
        # Epochs win, so that steps beside them are not kept; the form shows what it starts with.
        filled["max_train_steps"] = shown_number(make_fields()["max_train_steps"].default)
    reading = read_form(filled)
    assert reading.job is not None, reading.problems
    again = fill_form(read_pasted(reading.job.config_toml, reading.job.dataset_toml))
    fields = make_fields()
    shown = {name: component_value(field, again.values.get(name, field.default)) for name, field in fields.items()}
    # The prompts have a file of their own.
    shown["sample_prompt_lines"] = reading.job.sample_prompts.strip()
    assert {name: typed_value(fields[name], value) for name, value in shown.items()} == {
        name: typed_value(fields[name], value) for name, value in filled.items()
    }
    assert again.left_out == ()
    second = read_form(shown)
    assert (second.options, second.job) == (reading.options, reading.job)


def test_the_shown_command_line_gives_the_same_options(filled: dict[str, object]) -> None:
    reading = read_form(filled)
    words = shlex.split(reading.command_line.replace("\\\n", " "))
    assert words[:2] == ["python", "flux_train_network.py"]
    assert parse_command_line(words[2:]).options == reading.options


def test_without_any_caption_the_trigger_word_is_the_caption(filled: dict[str, object], tmp_path: Path) -> None:
    for caption in (tmp_path / "cats").glob("*.txt"):
        caption.unlink()
    subset = tomlkit.parse(read_form(filled).dataset_toml).unwrap()["datasets"][0]["subsets"][0]
    assert subset["class_tokens"] == "ohwx"
    assert "caption_prefix" not in subset


@pytest.mark.parametrize("wrapping", ['"{}"', "'{}'", "  {} ", '"{}" '])
def test_a_path_that_was_copied_with_its_quotes_is_the_path(filled: dict[str, object], wrapping: str) -> None:
    for name in ("pretrained_model_name_or_path", "image_dir"):
        filled[name] = wrapping.format(filled[name])
    assert read_form(filled).problems == ()


def test_a_quote_inside_a_path_belongs_to_it(tmp_path: Path) -> None:
    field = make_fields()["image_dir"]
    for name in ('6" prints', "it's", '"'):
        assert typed_value(field, str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize(
    "path", ["~nobody-of-this-name/flux.safetensors", "/nowhere/a\0b", r"C:\models\flux 1.safetensors"]
)
def test_any_text_in_a_box_for_a_path_is_answered_at_its_field(filled: dict[str, object], path: str) -> None:
    for name in ("pretrained_model_name_or_path", "image_dir"):
        assert problem_fields({**filled, name: path}).get(name), name
    name = "pretrained_model_name_or_path"
    assert recognised({name: cast("Path", typed_value(make_fields()[name], path))}) == {}


def test_a_problem_at_a_field_is_told_in_the_words_of_the_page(filled: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 5)
    found = problem_fields(
        filled
        | {
            "t5xxl": filled["clip_l"],
            "ae": tmp_path / "cut.safetensors",
            "pretrained_model_name_or_path": "/nowhere",
            "network_dim": "0",
            "num_repeats": "x",
        }
    )
    assert found["t5xxl"].startswith("This is a CLIP text encoder. T5-XXL takes")
    assert found["t5xxl"].endswith("This file belongs to CLIP-L.")
    assert found["pretrained_model_name_or_path"] == "This file does not exist. Check the path for a typing error."
    assert found["network_dim"] == "Rank is 0; it must be 1 to 1024."
    assert found["num_repeats"].startswith("Repeats is x; it must be a whole number, 1 or more")
    assert not [text for text in found.values() if "--" in text or "network_dim" in text or "num_repeats" in text]


def test_empty_needed_fields_are_missing_not_wrong(filled: dict[str, object]) -> None:
    filled |= {"pretrained_model_name_or_path": "", "image_dir": "  ", "output_name": ""}
    reading = read_form(filled)
    assert reading.missing == ("pretrained_model_name_or_path", "image_dir", "output_name")
    assert reading.problems == ()
    assert reading.job is None


def test_an_empty_form_says_what_is_needed_and_nothing_else() -> None:
    values = {
        name: component_value(field, start_values().get(name, field.default)) for name, field in make_fields().items()
    }
    reading = read_form(values)
    assert reading.problems == ()
    assert set(reading.missing) >= {"pretrained_model_name_or_path", "t5xxl", "clip_l", "ae", "image_dir"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network_dim", "0"),
        ("network_dim", "sixteen"),
        ("learning_rate", "-1"),
        ("learning_rate", "1e-4x"),
        ("max_train_epochs", "1.5"),
        ("resolution", "500"),
        ("resolution", "big"),
        ("resolution", ""),
        ("train_batch_size", "0"),
        ("num_repeats", "0"),
        ("num_repeats", "many"),
        ("blocks_to_swap", "99"),
        ("caption_dropout_rate", "2"),
        ("seed", "-3"),
        ("pretrained_model_name_or_path", "/nowhere/flux.safetensors"),
        ("image_dir", "/nowhere"),
        ("more_options", "network_dim ="),
        ("more_options", "netwrk_args = 1"),
        ("more_options", "network_dim = 4"),
        ("more_options", "keep_tokens = -1"),
    ],
)
def test_a_wrong_value_is_a_problem_at_its_field(filled: dict[str, object], name: str, value: str) -> None:
    found = problem_fields({**filled, name: value})
    assert set(found) == {name}
    assert found[name].strip() != ""


def test_a_file_of_another_kind_is_named_at_its_field(filled: dict[str, object], tiny_models: TinyModels) -> None:
    found = problem_fields({**filled, "t5xxl": str(tiny_models.clip_l)})
    assert set(found) == {"t5xxl"}
    assert "CLIP" in found["t5xxl"]


def test_a_truncated_model_is_found_before_the_start(
    filled: dict[str, object], tmp_path: Path, tiny_models: TinyModels
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_models.ae.read_bytes()[:-1000])
    assert set(problem_fields({**filled, "ae": str(cut)})) == {"ae"}


def test_several_problems_are_shown_at_once(filled: dict[str, object]) -> None:
    assert set(problem_fields({**filled, "network_dim": "0", "num_repeats": "0", "ae": "/nowhere"})) == {
        "network_dim",
        "num_repeats",
        "ae",
    }


def test_chroma_is_trained_from_the_page_without_clip(filled: dict[str, object], tmp_path: Path) -> None:
    chroma = make_chroma(tmp_path / "chroma.safetensors")
    values = {**filled, "pretrained_model_name_or_path": str(chroma), "clip_l": None}
    reading = read_form({**values, "more_options": 'model_type = "chroma"'})
    assert reading.job is not None, (reading.problems, reading.missing)
    assert 'model_type = "chroma"' in reading.job.config_toml
    assert read_form(values).missing == ("clip_l",)


def test_more_options_reach_the_config(filled: dict[str, object]) -> None:
    job = read_form({**filled, "more_options": 'network_args = ["rank_dropout=0.1"]\nkeep_tokens = 1'}).job
    assert job is not None
    config = tomlkit.parse(job.config_toml).unwrap()
    flat = {
        key: value
        for name, value in config.items()
        for key, value in (value.items() if isinstance(value, dict) else [(name, value)])
    }
    assert flat["network_args"] == ["rank_dropout=0.1"]
    assert flat["keep_tokens"] == 1


def test_every_field_is_an_option_or_one_of_the_forms_own() -> None:
    own = {"image_dir", "trigger_word", "num_repeats", "sample_prompt_lines", "more_options"}
    assert set(ALL_NAMES) - set(Options.model_fields) == own
    assert len(set(ALL_NAMES)) == len(ALL_NAMES)
    assert set(DATASET_NAMES) <= set(ALL_NAMES)
    assert set(ALL_NAMES) >= NOT_IN_PRESETS
    assert all(field.label and field.help for field in make_fields().values())


@pytest.mark.parametrize(
    ("value", "text"), [(1e-4, "0.0001"), (2e-6, "2e-06"), (16, "16"), (1.0, "1"), (None, ""), (0.5, "0.5")]
)
def test_numbers_are_shown_as_people_write_them(value: object, text: str) -> None:
    assert shown_number(value) == text


# ------------------------------------------------------------------------------------------------------- presets


def test_a_preset_gives_back_what_was_saved(filled: dict[str, object]) -> None:
    filled |= {"network_dim": "24", "learning_rate": "0.00035", "gradient_checkpointing": False, "blocks_to_swap": ""}
    filled |= {"max_train_epochs": "", "max_train_steps": "777", "sample_prompt_lines": "a\nb", "enable_bucket": True}
    save_own("Mine", preset_values(filled))
    loaded = preset_form_values("Mine")
    fields = make_fields()
    kept = {name: field for name, field in fields.items() if name not in NOT_IN_PRESETS}
    assert {name: component_value(field, loaded.get(name)) for name, field in kept.items()} == {
        name: filled[name] for name in kept
    }


def test_a_preset_holds_no_files_and_no_names(filled: dict[str, object]) -> None:
    assert set(preset_values(filled)) & NOT_IN_PRESETS == set()


def test_own_presets_are_listed_replaced_and_deleted(filled: dict[str, object]) -> None:
    values = preset_values(filled)
    save_own("Mine", values)
    save_own("Mine", {**values, "network_dim": 3})
    assert [preset.name for preset in presets_of_kind("own")] == ["Mine"]
    assert preset_form_values("Mine")["network_dim"] == 3
    delete_own("Mine")
    assert presets_of_kind("own") == []
    with pytest.raises(UserError, match="Mine"):
        preset_form_values("Mine")


@pytest.mark.parametrize("name", ["", "..", "a/b", "character"])
def test_a_name_that_cannot_be_used_is_refused(filled: dict[str, object], name: str) -> None:
    with pytest.raises(UserError):
        save_own(name, preset_values(filled))


@pytest.mark.parametrize("kind", ["purpose", "vram"])
def test_every_built_in_preset_fits_the_form(filled: dict[str, object], kind: str) -> None:
    fields = make_fields()
    presets = presets_of_kind(kind)
    assert len(presets) >= 3
    for preset in presets:
        values = {n: component_value(fields[n], v) for n, v in preset_form_values(preset.name).items() if n in fields}
        reading = read_form({**filled, **values, "blocks_to_swap": ""})
        assert reading.problems == (), preset.name


# ------------------------------------------------------------------------------------------------------ estimate


def plan(filled: dict[str, object], flux: Path, gigabytes: float | None, ram_gb: float = 64) -> Plan | str:
    reading = read_form({**filled, "pretrained_model_name_or_path": str(flux)})
    return plan_memory(reading, vram_gb=gigabytes, ram_gb=ram_gb)


def test_less_memory_takes_more_blocks(filled: dict[str, object], tmp_path: Path) -> None:
    flux = make_sparse_flux(tmp_path / "flux1-dev.safetensors")
    filled |= {"mixed_precision": "bf16", "gradient_checkpointing": True, "resolution": "512", "blocks_to_swap": ""}
    filled |= {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
    plans = [plan(filled, flux, gigabytes) for gigabytes in (80.0, 24.0, 16.0, 12.0)]
    picked = [found.choice.blocks_to_swap for found in plans if isinstance(found, Plan)]
    assert picked[0] == 0
    assert picked == sorted(set(picked))
    assert len(picked) == 4
    tightest = plans[-1]
    assert isinstance(tightest, Plan)
    assert tightest.fits
    assert tightest.choice.estimate.peak_bytes <= 12 * 2**30


def test_what_cannot_fit_says_why_and_what_helps(filled: dict[str, object], tmp_path: Path) -> None:
    flux = make_sparse_flux(tmp_path / "flux1-dev.safetensors")
    found = plan({**filled, "resolution": "1024", "gradient_checkpointing": False}, flux, 4.0)
    assert isinstance(found, Plan)
    assert not found.fits
    html = memory_view.plan_html(found, num_steps=100, accumulation=1)
    assert "Does not fit" in html
    assert "gradient_checkpointing" in html
    assert "too much" in html
    assert "Expected time" not in html, "what cannot run takes no time"
    labels = {name: field.label for name, field in make_fields().items()}
    assert found.alternatives
    assert "Blocks to swap: " in memory_view.alternative_text(found.alternatives[0], labels)


def test_main_memory_counts_too_and_the_bars_add_up(filled: dict[str, object], tmp_path: Path) -> None:
    flux = make_sparse_flux(tmp_path / "flux1-dev.safetensors")
    found = plan(filled, flux, 8.0, ram_gb=8)
    assert isinstance(found, Plan)
    assert not found.fits
    assert "main memory" in memory_view.plan_html(found, num_steps=None, accumulation=1)
    assert sum(segment.bytes for segment in found.choice.device_bar) == found.choice.estimate.peak_bytes
    assert sum(segment.bytes for segment in found.choice.host_bar) == found.choice.estimate.host_peak_bytes


def test_the_time_is_that_of_all_steps_and_called_rough(filled: dict[str, object], tmp_path: Path) -> None:
    flux = make_sparse_flux(tmp_path / "flux1-dev.safetensors")
    found = plan({**filled, "gradient_checkpointing": True}, flux, 24.0)
    assert isinstance(found, Plan)
    text = memory_view.time_text(found, num_steps=1000, accumulation=2)
    assert memory_view.duration(found.choice.step_seconds * 2000) in text
    assert "not measured" in text
    assert [memory_view.duration(seconds) for seconds in (5, 600, 3 * 3600)] == [
        "under a minute",
        "about 10 min",
        "about 3.0 h",
    ]


def test_the_estimate_says_what_it_lacks(filled: dict[str, object], tiny_models: TinyModels) -> None:
    assert "card" in str(plan(filled, tiny_models.flux_dev, None))
    assert "card" in str(plan(filled, tiny_models.flux_dev, 0.0))
    assert "/nowhere" in str(plan(filled, Path("/nowhere"), 24.0))
    assert "marked" in str(plan({**filled, "network_dim": "0"}, tiny_models.flux_dev, 24.0))


def test_without_a_model_the_published_sizes_are_assumed(filled: dict[str, object]) -> None:
    found = plan_memory(read_form({**filled, "pretrained_model_name_or_path": ""}), vram_gb=24.0)
    assert isinstance(found, Plan)
    assert "FLUX.1-dev" in memory_view.plan_html(found, num_steps=None, accumulation=1)
