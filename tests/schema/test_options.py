"""The options: held against the reference trainer's list, checked alone and against each other.

`reference_options.json` lists the options of kohya-ss/sd-scripts' `flux_train_network.py` (commit 48d368fa) with type,
default and choices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trainer.schema.base import Problem, UserError
from trainer.schema.optimizer_args import parse_optimizer_args
from trainer.schema.option_reading import Given, Reading, read_options
from trainer.schema.option_status import STATUS, opt_of
from trainer.schema.options import GROUPS, OUR_OPTIONS, Options
from trainer.schema.options_data import parse_resolution

REFERENCE: Mapping[str, Mapping[str, Any]] = json.loads(
    (Path(__file__).parent / "reference_options.json").read_text(encoding="utf-8")
)
TYPES = {"flag": "flag", "str": "text", "path": "path", "int": "integer", "float": "number", "steps": "steps"}
# A plain text in the reference that is always a path.
PATHS = {"pretrained_model_name_or_path", "base_weights"}
# The reference's default is an empty text, which it takes for AdamW.
OTHER_DEFAULTS = {"optimizer_type": "AdamW"}


def read(**values: object) -> Reading:
    return read_options({name: Given(value, f"--{name}") for name, value in values.items()})


def problem(**values: object) -> Problem:
    """The one problem with these values."""
    problems = read(**values).problems
    assert len(problems) == 1, problems
    return problems[0]


def options(**values: object) -> Options:
    reading = read(**values)
    assert not reading.problems
    return reading.options


# ---------------------------------------------------------------------------------------------------------- the list


def test_every_option_of_the_reference_has_exactly_one_status() -> None:
    assert len(REFERENCE) == 215
    assert set(STATUS) == set(REFERENCE) | OUR_OPTIONS
    assert not set(REFERENCE) & OUR_OPTIONS
    assert {name for name, status in STATUS.items() if status.is_ours} == OUR_OPTIONS
    supported = {name for name, status in STATUS.items() if status.status == "supported"}
    assert supported == set(Options.model_fields)
    assert {status.status for status in STATUS.values()} == {"supported", "inert", "refused"}


@pytest.mark.parametrize("name", REFERENCE)
def test_type_default_and_choices_are_the_references(name: str) -> None:
    status, reference = STATUS[name], REFERENCE[name]
    assert status.value_type == ("path" if name in PATHS else TYPES[reference["type"]])
    assert status.is_list == reference.get("list", False)
    default = OTHER_DEFAULTS.get(name, reference["default"])
    assert status.default == default
    if name == "network_alpha":
        assert type(status.default) is int, "the integer is stored as one in the file"
    if "choices" in reference:
        extra = {"no"} if name == "dynamo_backend" else set[str]()
        assert set(status.choices) == set(reference["choices"]) | extra


def test_every_option_belongs_to_one_group_and_says_what_it_is() -> None:
    grouped = [name for group in GROUPS.values() for name in group.model_fields]
    assert sorted(grouped) == sorted(Options.model_fields)
    for name in grouped:
        opt = opt_of(name)
        assert opt.help.endswith("."), name
        assert opt.label, name
        assert not opt.label.endswith("."), name


def test_everything_that_is_not_carried_out_has_a_plain_reason() -> None:
    for name, status in STATUS.items():
        if status.status != "supported":
            assert len(status.reason) > 10, name
            assert not status.reason.endswith("."), name


# ------------------------------------------------------------------------------------------------------- single values


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("network_dim", 0, "network_dim is 0; it must be 1 to 1024"),
        ("network_dim", "sixteen", "network_dim is sixteen; it must be a whole number, 1 to 1024"),
        ("network_dim", True, "network_dim is true; it must be a whole number"),
        ("network_dim", 1.5, "network_dim is 1.5; it must be a whole number, 1 to 1024"),
        ("learning_rate", "1e-4x", "learning_rate is 1e-4x; it must be a number, 0 or more"),
        ("learning_rate", -1, "learning_rate is -1; it must be 0 or more"),
        ("learning_rate", "nan", "learning_rate is nan; it must be a number, 0 or more"),
        ("learning_rate", float("inf"), "learning_rate is inf; it must be a number, 0 or more"),
        ("network_dropout", 1, "network_dropout is 1; it must be at least 0 and below 1"),
        ("discrete_flow_shift", 0, "discrete_flow_shift is 0; it must be above 0"),
        ("caption_dropout_rate", 2, "caption_dropout_rate is 2; it must be 0 to 1"),
        ("mixed_precision", "bf61", "mixed_precision is bf61; it must be one of no, fp16, bf16"),
        ("gradient_checkpointing", "perhaps", "gradient_checkpointing is perhaps; it must be true or false"),
        ("resolution", "500", "resolution is 500; it must be a multiple of 16; 496 is near"),
        ("resolution", "512,500", "resolution is 512,500; it must be a multiple of 16; 512,496 is near"),
        ("resolution", "big", "resolution is big; it must be a size such as 512, or width,height such as 768,512"),
        ("lr_warmup_steps", "1.5", "lr_warmup_steps is 1.5; it must be a whole number of steps, or a part"),
        ("lr_warmup_steps", "150%", "lr_warmup_steps is 150%; it must be a whole number of steps, or a part"),
        ("caption_separator", "", "caption_separator is empty; it must be at least one character"),
        ("text_encoder_lr", "1e-5 1e-5 1e-5", "text_encoder_lr is 1e-5 1e-5 1e-5; it must be at most two numbers"),
        ("text_encoder_lr", -1, "text_encoder_lr is -1; it must be 0 or more"),
        ("clip_l", True, "clip_l is true; it must be a path"),
        ("optimizer_type", "pordigy", "optimizer_type is pordigy; it must be one of AdamW, AdamW8bit"),
        ("lr_scheduler", "cosin", "lr_scheduler is cosin; it must be one of constant, constant_with_warmup"),
        ("lr_decay_steps", "1.5", "lr_decay_steps is 1.5; it must be a whole number of steps, or a part"),
        ("lr_scheduler_min_lr_ratio", 2, "lr_scheduler_min_lr_ratio is 2; it must be 0 to 1"),
        ("lr_scheduler_num_cycles", 0, "lr_scheduler_num_cycles is 0; it must be 1 or more"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(name: str, value: object, expected: str) -> None:
    found = problem(**{name: value})
    assert found.what.startswith(expected)
    assert found.field == name
    assert found.where == f"--{name}"


def test_a_misspelt_choice_gets_the_nearest_one() -> None:
    assert problem(timestep_sampling="flux-shift").hint == "Did you mean flux_shift?"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("resolution", 512, "512"),
        ("resolution", "512,512", "512"),
        ("resolution", " 768, 512 ", "768,512"),
        ("resolution", [768, 512], "768,512"),
        ("lr_warmup_steps", "0.1", 0.1),
        ("lr_warmup_steps", "10%", 0.1),
        ("lr_warmup_steps", 100, 100),
        ("lr_warmup_steps", "100", 100),
        ("text_encoder_lr", 1e-5, (1e-5,)),
        ("text_encoder_lr", "1e-5", (1e-5,)),
        ("text_encoder_lr", [1e-5, 2e-5], (1e-5, 2e-5)),
        ("network_args", "rank_dropout=0.1 verbose=True", ("rank_dropout=0.1", "verbose=True")),
        ("optimizer_type", "adamw8BIT", "AdamW8bit"),
        ("optimizer_type", "prodigy", "Prodigy"),
        ("optimizer_type", "adam", "Adam"),
        ("optimizer_type", "some_package.sub.Class", "some_package.sub.Class"),
        ("lr_decay_steps", "20%", 0.2),
        ("optimizer_type", "", "AdamW"),
        ("lr_scheduler", "Cosine", "cosine"),
        ("network_alpha", 8, 8.0),
        ("network_dim", "16", 16),
        ("output_name", 5, "5"),
        ("clip_l", "models/clip.safetensors", Path("models/clip.safetensors")),
        ("clip_l", "", None),
        ("max_train_epochs", "", None),
        ("caption_extension", "txt", ".txt"),
    ],
)
def test_a_value_becomes_its_type(name: str, value: object, expected: object) -> None:
    more = {"lr_scheduler": "cosine"} if name == "lr_warmup_steps" else {}
    result = getattr(options(**{name: value}, **more), name)
    assert result == expected
    assert type(result) is type(expected)


def test_options_cannot_be_changed_or_extended() -> None:
    made = Options()
    with pytest.raises(ValidationError, match="frozen"):
        made.network_dim = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Options.model_validate({"netwrk_dim": 3})


@pytest.mark.parametrize("value", ["0", "8", "15,16", "1,2,3", "-16", "16x16", ""])
def test_a_size_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_resolution(value)


# ---------------------------------------------------------------------------------------------- not carried out


def test_an_option_without_effect_is_one_note() -> None:
    reading = read(
        sdpa=True, persistent_data_loader_workers=True, vae="old.safetensors", network_module="networks.lora_flux"
    )
    assert [note for note in reading.notes if "no effect" in note] == [
        "sdpa has no effect: attention always runs through torch's scaled dot product attention",
        "persistent_data_loader_workers has no effect: pictures are read by threads, which start in no time",
        "vae has no effect: FLUX's autoencoder is given with --ae",
    ]


def test_an_option_at_its_default_is_no_news() -> None:
    defaults = {name: status.default for name, status in STATUS.items() if status.status != "supported"}
    quiet = read(network_module="networks.lora_flux").notes
    assert read(**defaults, network_module="networks.lora_flux").notes == quiet
    as_text = {name: str(value).lower() for name, value in defaults.items() if isinstance(value, (bool, int, float))}
    assert read(**as_text, network_module="networks.lora_flux").notes == quiet


@pytest.mark.parametrize("name", [name for name, status in STATUS.items() if status.status == "refused"])
def test_every_refused_option_is_a_problem_that_names_it(name: str) -> None:
    status = STATUS[name]
    values: dict[str, object] = {"flag": True, "text": "a", "path": "a", "integer": 7, "number": 7.5, "steps": 7}
    other = [choice for choice in status.choices if choice != str(status.default)]
    found = problem(**{name: other[0] if other else values[status.value_type]})
    assert found.what.startswith(name)
    assert found.field == name


@pytest.mark.parametrize(
    ("name", "value", "what", "hint"),
    [
        ("save_model_as", "ckpt", "save_model_as ckpt is not written: such files can hold code", "Use safetensors."),
        ("network_module", "networks.dylora", "network_module networks.dylora does not fit FLUX", "networks.lora_flux"),
        ("deepspeed", True, "deepspeed cannot be used: DeepSpeed shares what trains among devices", "--blocks_to_swap"),
        (
            "dataset_class",
            "a.B",
            "dataset_class cannot be used: such a class is made of sd-scripts' own",
            "dataset_config",
        ),
    ],
)
def test_what_is_not_supported_names_the_alternative(name: str, value: object, what: str, hint: str) -> None:
    found = problem(**{name: value})
    assert found.what.startswith(what)
    assert hint in str(found.hint)


def test_a_refused_option_of_the_wrong_type_says_so() -> None:
    assert problem(zero_stage=5).what == "zero_stage is 5; it must be one of 0, 1, 2, 3"
    assert problem(full_bf16="so").what == "full_bf16 is so; it must be true or false"


# --------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("values", "field", "pieces"),
    [
        ({"cache_latents": True, "random_crop": True}, "random_crop", "rules out"),
        ({"lr_warmup_steps": 10}, "lr_warmup_steps", "constant has no warm-up"),
        ({"loss_type": "huber", "huber_schedule": "snr"}, "huber_schedule", "does not exist for FLUX"),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep", "not below max_timestep 500"),
        ({"use_8bit_adam": True, "optimizer_type": "AdamW"}, "use_8bit_adam", "contradicts optimizer_type AdamW"),
        ({"log_with": "tensorboard"}, "logging_dir", "log_with tensorboard needs logging_dir"),
        ({"min_bucket_reso": 512, "max_bucket_reso": 256}, "min_bucket_reso", "above max_bucket_reso 256"),
        ({"bucket_reso_steps": 24}, "bucket_reso_steps", "24; it must be a multiple of 16"),
        ({"blocks_to_swap": 39}, "blocks_to_swap", "39; it must be 0 to 38"),
        ({"full_bf16": True}, "full_bf16", "full_bf16 needs mixed_precision bf16, and it is no"),
        ({"full_fp16": True, "mixed_precision": "bf16"}, "full_fp16", "needs mixed_precision fp16, and it is bf16"),
        ({"base_storage": "nf4", "fp8_base": True}, "base_storage", "nf4, but fp8_base asks for fp8"),
        ({"base_storage": "int8", "fp8_base_unet": True}, "base_storage", "int8, but fp8_base"),
        ({"output_name": "a/b"}, "output_name", "without a folder"),
        ({"output_name": "\u00e9" * 76}, "output_name", "at most 150 bytes long"),
        ({"network_args": ["train_block=all"]}, "network_args", '"train_block" is not a known key'),
        ({"optimizer_args": ["weight_deca=0.1"]}, "optimizer_args", "AdamW has no setting weight_deca"),
    ],
)
def test_options_that_contradict_each_other_are_a_problem_at_one_of_them(
    values: dict[str, object], field: str, pieces: str
) -> None:
    found = problem(**values)
    assert found.field == field
    assert pieces in found.what
    assert found.hint


def test_settings_that_go_together_are_accepted() -> None:
    options(loss_type="huber", huber_schedule="constant")
    options(loss_type="smooth_l1", huber_schedule="exponential")
    options(lr_scheduler="constant_with_warmup", lr_warmup_steps=10)
    options(log_with="tensorboard", logging_dir="logs")
    options(blocks_to_swap=38)
    options(cache_text_encoder_outputs=True, keep_tokens=1, caption_prefix="ohwx", shuffle_caption=True)


def test_all_problems_are_reported_and_rules_wait_for_right_values() -> None:
    reading = read(
        network_dim=0, learning_rate=-1, blocks_to_swap=99, validation_seed=-3, lr_scheduler="x", lr_warmup_steps=5
    )
    assert {found.field for found in reading.problems} == {
        "network_dim",
        "learning_rate",
        "blocks_to_swap",
        "validation_seed",
        "lr_scheduler",
    }
    assert (reading.options.network_dim, reading.options.learning_rate) == (None, 2e-6), "what is wrong is left out"


# ---------------------------------------------------------------------------------------------------- corrections


@pytest.mark.parametrize(
    ("given", "expected", "note"),
    [
        ({"network_module": "networks.lora"}, {"network_module": "networks.lora_flux"}, "networks.lora is taken for"),
        ({}, {"network_module": "networks.lora_flux"}, "network_module is not given"),
        ({"use_8bit_adam": True}, {"use_8bit_adam": False, "optimizer_type": "AdamW8bit"}, "old name"),
        ({"fp8_base_unet": True}, {"fp8_base": True}, "fp8_base_unet turns"),
        ({"split_mode": True}, {"split_mode": False, "blocks_to_swap": 18}, "split_mode"),
        ({"split_mode": True, "blocks_to_swap": 4}, {"split_mode": False, "blocks_to_swap": 4}, "split_mode"),
        ({"cache_latents_to_disk": True}, {"cache_latents": True}, "turns cache_latents on"),
        (
            {"cache_text_encoder_outputs_to_disk": True},
            {"cache_text_encoder_outputs": True},
            "turns cache_text_encoder_outputs on",
        ),
        ({"caption_extention": "txt"}, {"caption_extension": ".txt", "caption_extention": None}, "old name"),
        ({"sample_every_n_steps": 0}, {"sample_every_n_steps": None}, "means no samples"),
        ({"sample_every_n_epochs": -1}, {"sample_every_n_epochs": None}, "means no samples"),
    ],
)
def test_old_names_and_implied_settings_are_carried_over_with_a_note(
    given: dict[str, object], expected: dict[str, object], note: str
) -> None:
    reading = read(**given)
    assert not reading.problems
    assert {name: getattr(reading.options, name) for name in expected} == expected
    assert len([line for line in reading.notes if note in line]) == 1


def test_corrected_options_need_no_further_correction() -> None:
    corrected = options(use_8bit_adam=True, cache_latents_to_disk=True, split_mode=True, caption_extention="txt")
    again = read(**corrected.model_dump())
    assert again.options == corrected
    assert not [note for note in again.notes if "old name" in note or "turns" in note]


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"dataset_config": "d.toml", "train_data_dir": "t"}, "train_data_dir has no effect beside dataset_config"),
        ({"max_train_epochs": 2, "max_train_steps": 5}, "max_train_steps has no effect: max_train_epochs 2 wins"),
        (
            {"sample_every_n_epochs": 1, "sample_every_n_steps": 1, "sample_prompts": "p.txt"},
            "sample_every_n_epochs wins",
        ),
        ({"sample_every_n_epochs": 1}, "no samples are made: sample_prompts is not given"),
        ({"text_encoder_lr": [1e-5, 1e-5]}, "the second text_encoder_lr has no effect"),
    ],
)
def test_what_has_no_effect_beside_other_options_is_a_note(given: dict[str, object], note: str) -> None:
    assert len([line for line in read(**given).notes if note in line]) == 1


# -------------------------------------------------------------------------------------------------- optimizer_args


def test_optimizer_settings_are_python_literals() -> None:
    parsed = parse_optimizer_args(["weight_decay=0.1", "betas=[0.9, 0.99]", "amsgrad=True", "fused=None"], "AdamW")
    assert parsed == {"weight_decay": 0.1, "betas": (0.9, 0.99), "amsgrad": True, "fused": None}
    assert parse_optimizer_args(None) == {}
    assert parse_optimizer_args(["anything=3"]) == {"anything": 3}


@pytest.mark.parametrize(
    ("kind", "text", "what", "hint"),
    [
        ("AdamW", "weight_deca=0.1", "AdamW has no setting weight_deca", "Did you mean weight_decay?"),
        ("AdamW", "weight_decay", '"weight_decay" is not of the form key=value', "weight_decay=0.01"),
        ("AdamW", "weight_decay=much", "weight_decay is much; it must be a number, 0 or more", None),
        ("AdamW", "weight_decay=-1", "weight_decay is -1; it must be a number, 0 or more", None),
        ("AdamW", "betas=(0.9,)", "betas is (0.9,); it must be two numbers below 1", None),
        ("AdamW", "betas=(0.9,1.0)", "betas is (0.9,1.0); it must be two numbers below 1", None),
        ("AdamW", "amsgrad=true", "amsgrad is true; it must be True or False", None),
        ("AdamW", "lr=1e-4", "AdamW has no setting lr", "Use --learning_rate."),
        ("AdamW", "min_8bit_size=4096", "AdamW has no setting min_8bit_size", "It takes betas"),
        ("AdamW8bit", "percentile_clipping=95", "AdamW8bit has no setting percentile_clipping", "--max_grad_norm"),
        ("AdamW8bit", "min_8bit_size=0", "min_8bit_size is 0; it must be a whole number, 1 or more", None),
    ],
)
def test_a_wrong_optimizer_setting_is_named(kind: str, text: str, what: str, hint: str | None) -> None:
    with pytest.raises(UserError) as caught:
        parse_optimizer_args([text], kind)
    assert caught.value.exit_code == 2
    (found,) = caught.value.problems
    assert found.what.startswith(what)
    assert found.field == "optimizer_args"
    if hint is not None:
        assert hint in str(found.hint)
