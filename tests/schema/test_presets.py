"""Presets: the built-in ones are right for their cards, the user's own come back as they were saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.folders import user_presets_dir
from trainer.schema.memory import GIB, estimate
from trainer.schema.memory_plan import usable_host_bytes
from trainer.schema.options import Options
from trainer.schema.presets import (
    BUILT_IN_DIR,
    Preset,
    delete_preset,
    import_preset,
    list_presets,
    load_preset,
    preset_text,
    rename_preset,
    restore_preset,
    save_preset,
)
from trainer.tools import make_vram_presets
from trainer.tools.make_vram_presets import CARDS, Card, main, preset_name

SIZES = (6, 8, 10, 12, 16, 24, 48, 80)
DEV = FluxParams(64, 64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, True)
FORM_ONLY = {"vram_gb", "num_repeats", "sample_prompt_lines", "more_options"}
MACHINE_OR_PROJECT = {"pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "output_name", "output_dir", "device"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path))


def built_in(kind: str) -> list[Preset]:
    return [preset for preset in list_presets() if preset.kind == kind]


def write_own(name: str, text: str) -> Path:
    user_presets_dir().mkdir(exist_ok=True)
    path = user_presets_dir() / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def options_of(values: Mapping[str, object]) -> Options:
    return Options.model_validate({name: value for name, value in values.items() if name not in FORM_ONLY})


# ---- built in ----


def test_the_built_in_presets_are_there_in_order() -> None:
    assert [preset.name for preset in built_in("purpose")] == ["character", "style", "object", "concept", "quick-test"]
    assert [preset.name for preset in built_in("vram")] == [f"vram-{size:02d}" for size in SIZES]
    assert [preset.title for preset in built_in("vram")] == [f"{size} GB" for size in SIZES]
    assert [preset.name for preset in built_in("demo")] == ["demo"]
    assert len(list_presets()) == len(list(BUILT_IN_DIR.glob("*.toml")))
    assert all(preset.is_built_in and preset.description for preset in list_presets())


def test_every_value_of_a_built_in_preset_is_an_option_or_a_field_and_valid() -> None:
    for preset in list_presets():
        names = set(preset.values)
        assert not names & MACHINE_OR_PROJECT
        assert names - FORM_ONLY <= set(Options.model_fields), preset.name
        options_of(preset.values)


@pytest.mark.parametrize("card", CARDS, ids=preset_name)
def test_a_card_preset_is_what_the_estimate_makes(card: Card) -> None:
    written = (BUILT_IN_DIR / preset_name(card)).read_text(encoding="utf-8")
    assert written == make_vram_presets.preset_text(card), "run python -m trainer.tools.make_vram_presets"


def test_the_tool_writes_all_of_them(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in BUILT_IN_DIR.glob("vram-*.toml")}


@pytest.mark.parametrize("gigabytes", SIZES)
def test_a_card_preset_fits_its_card_with_either_purpose(gigabytes: int) -> None:
    card = load_preset(f"vram-{gigabytes:02d}")
    assert card.values["vram_gb"] == gigabytes
    side = int(str(card.values["resolution"]))
    for purpose in built_in("purpose"):
        options = options_of({**purpose.values, **card.values, "sample_prompts": "prompts.txt"})
        result = estimate(DEV, options, width=side, height=side, batch_size=1, vram_bytes=gigabytes * GIB)
        assert result.phases[-1].name == "sampling"
        assert result.fits, f"{purpose.name}: {result.reason}"
        ram_gb = next(entry.ram_gb for entry in CARDS if entry.vram_gb == gigabytes)
        assert result.host_peak_bytes <= usable_host_bytes(ram_gb * GIB)


def test_a_card_preset_swaps_hardly_more_than_its_card_needs() -> None:
    for card in built_in("vram"):
        side, gigabytes = int(str(card.values["resolution"])), int(str(card.values["vram_gb"]))
        options = options_of({**load_preset("style").values, **card.values, "sample_prompts": "prompts.txt"})
        swap = options.blocks_to_swap
        assert isinstance(swap, int)
        if swap == 0:
            continue
        fewer = estimate(
            DEV,
            options,
            width=side,
            height=side,
            batch_size=1,
            blocks_to_swap=max(swap - 4, 0),
            vram_bytes=gigabytes * GIB,
        )
        assert fewer.fits is False, card.name


def test_a_purpose_leaves_the_card_settings_alone_and_the_card_the_purpose() -> None:
    for card in built_in("vram"):
        assert not set(card.values) & {"learning_rate", "network_dim", "max_train_epochs", "num_repeats", "seed"}
        for purpose in built_in("purpose"):
            assert not set(purpose.values) & {"blocks_to_swap", "optimizer_type", "vram_gb"}
            # Large cards need no checkpointing; a purpose that turns it on again costs them time alone.
            shared = set(card.values) & set(purpose.values) - {"resolution", "gradient_checkpointing"}
            assert all(card.values[name] == purpose.values[name] for name in shared)


def test_each_purpose_replaces_all_of_the_one_before() -> None:
    first, *others = ({*preset.values} - {"resolution"} for preset in built_in("purpose"))
    assert all(names == first for names in others)


def test_training_presets_use_the_settings_that_flux_was_made_for() -> None:
    for preset in built_in("purpose"):
        assert preset.values["model_prediction_type"] == "raw"
        assert preset.values["guidance_scale"] == 1.0


def test_the_demo_preset_says_everything_a_demo_depends_on() -> None:
    demo = load_preset("demo").values
    expected = {
        "model_prediction_type": "raw",
        "guidance_scale": 1.5,
        "learning_rate": 2.5e-3,
        "network_dim": 16,
        "network_alpha": 16.0,
        "train_batch_size": 8,
        "optimizer_type": "AdamW",
        "resolution": "96",
        "enable_bucket": False,
        "timestep_sampling": "shift",
        "discrete_flow_shift": 3.1582,
        "t5xxl_max_token_length": 16,
        "max_train_epochs": 12,
        "save_every_n_epochs": 4,
        "sample_every_n_epochs": 4,
        "sample_at_first": True,
        "seed": 42,
        "mixed_precision": "no",
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
    }
    assert {name: demo[name] for name in expected} == expected
    # The page lays the demo's values over those it starts with.
    assert set(load_preset("character").values) <= set(demo)


# ---- own ----


def test_an_own_preset_comes_back_as_it_was_saved() -> None:
    values = {
        "learning_rate": 3e-4,
        "network_dim": 24,
        "flip_aug": False,
        "resolution": "768,512",
        "network_args": ["rank_dropout=0.1"],
        "num_repeats": 3,
        "sample_prompt_lines": 'a "cat"\n\\ zwei Kätzchen --w 512',
        "more_options": "huber_c = 0.2",
    }
    saved = save_preset("My Kätzchen 2.0", {**values, "seed": None})
    assert saved.kind == "own"
    loaded = load_preset("My Kätzchen 2.0")
    assert loaded.values == values
    assert {name: type(value) for name, value in loaded.values.items()} == {n: type(v) for n, v in values.items()}
    assert [preset.name for preset in list_presets() if not preset.is_built_in] == ["My Kätzchen 2.0"]


def test_saving_under_a_taken_name_replaces_only_when_allowed() -> None:
    save_preset("mine", {"seed": 1})
    with pytest.raises(UserError, match="there is a preset mine already"):
        save_preset("mine", {"seed": 2}, overwrite=False)
    assert load_preset("mine").values == {"seed": 1}
    save_preset("mine", {"seed": 2})
    assert load_preset("mine").values == {"seed": 2}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "../up",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "C:x",
        "con",
        "NUL",
        "com1.x",
        "x" * 61,
        "a\n",
        "end.",
        "end ",
        "a*",
    ],
)
def test_a_name_that_is_no_file_name_everywhere_is_refused(name: str) -> None:
    for use in (lambda: save_preset(name, {}), lambda: load_preset(name), lambda: delete_preset(name)):
        with pytest.raises(UserError):
            use()
    assert not list(user_presets_dir().parent.rglob("*.toml"))


@pytest.mark.parametrize("name", ["character", "Character", "demo"])
def test_built_in_presets_are_neither_replaced_nor_deleted(name: str) -> None:
    with pytest.raises(UserError, match="is a built-in preset"):
        save_preset(name, {"seed": 1})
    with pytest.raises(UserError, match="is a built-in preset"):
        delete_preset(name)
    assert (BUILT_IN_DIR / f"{name.lower()}.toml").is_file()


def test_a_deleted_preset_is_gone() -> None:
    save_preset("mine", {"seed": 1})
    delete_preset("mine")
    assert all(preset.name != "mine" for preset in list_presets())
    with pytest.raises(UserError, match="there is no preset mine any more"):
        delete_preset("mine")
    with pytest.raises(UserError, match="there is no preset mine"):
        load_preset("mine")


def test_values_that_are_no_options_are_not_saved() -> None:
    with pytest.raises(UserError) as caught:
        save_preset("mine", {"learning_rat": 1e-4, "network_dim": 0, "num_repeats": 0})
    fields = {problem.field for problem in caught.value.problems}
    assert {"network_dim", "num_repeats"} <= fields
    assert "learning_rat" in str(caught.value)
    assert not user_presets_dir().exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed = 1\n", "seed stands outside of a table"),
        ("[options]\nseed = \n", "cannot be read"),
        ("[optoins]\nseed = 1\n", "Did you mean options?"),
        ("[preset]\ntitel = 'x'\n", "Did you mean title?"),
        ("[preset]\nvram_gb = -1\n", "vram_gb is -1"),
        ("[dataset]\nnum_repeats = 1.5\n", "num_repeats is 1.5"),
        ("[dataset]\nnum_repeat = 1\n", "Did you mean num_repeats?"),
        ("[form]\nmore_options = 1\n", "more_options is 1"),
        ("[options]\nseed = -1\n", "seed"),
    ],
)
def test_a_damaged_own_preset_is_left_out_named_in_the_log_and_explained(
    text: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_own("broken", text)
    write_own("good", "[options]\nseed = 7\n")
    with caplog.at_level(logging.WARNING, logger="trainer"):
        assert [preset.name for preset in list_presets() if not preset.is_built_in] == ["good"]
    assert str(path) in caplog.text
    with pytest.raises(UserError) as caught:
        load_preset("broken")
    assert part in str(caught.value)


def test_a_copy_of_a_built_in_preset_is_an_own_one() -> None:
    write_own("my 8 GB", (BUILT_IN_DIR / "vram-08.toml").read_text(encoding="utf-8"))
    copy = load_preset("my 8 GB")
    assert (copy.kind, copy.title) == ("own", "my 8 GB")
    assert copy.values["blocks_to_swap"] == load_preset("vram-08").values["blocks_to_swap"]


def test_a_preset_is_renamed_deleted_and_taken_back() -> None:
    saved = save_preset("mine", {"network_dim": 8, "num_repeats": 3}, description="for cats")
    rename_preset("mine", "Yours")
    assert dict(load_preset("Yours").values) == dict(saved.values)
    save_preset("mine", {"network_dim": 4})
    with pytest.raises(UserError, match="already"):
        rename_preset("mine", "Yours")
    with pytest.raises(UserError, match="built-in"):
        rename_preset("character", "other")
    place = delete_preset("Yours")
    second = delete_preset("mine")
    assert {place.name, second.name} == {"Yours.toml", "mine.toml"}
    restore_preset(place, "Yours")
    assert load_preset("Yours").description == "for cats"
    save_preset("mine", {"network_dim": 5})
    with pytest.raises(UserError, match="again"):
        restore_preset(second, "mine")


def test_a_preset_goes_out_as_a_file_and_comes_back() -> None:
    for preset in list_presets():
        copy = import_preset(preset_text(preset), f"copy of {preset.name}")
        assert dict(load_preset(copy.name).values) == dict(preset.values)
    plain = import_preset("network_dim = 8\n[training]\nlearning_rate = 1e-3\n", "from an options file")
    assert dict(plain.values) == {"network_dim": 8, "learning_rate": 1e-3}
    for text in (
        "a = ",
        "[options]\nnetwork_dim = 'x'",
        "[options]\nunheard_of = 1",
        "network_dim = 1\n[options]\nseed = 1",
    ):
        with pytest.raises(UserError):
            import_preset(text, "broken")
    assert "broken" not in {preset.name for preset in list_presets()}
