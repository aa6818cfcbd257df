"""Optimizers and schedules in the options: names, settings, what cannot stand together, what has no effect."""

from __future__ import annotations

import typing

import pytest

from trainer.schema.base import Problem
from trainer.schema.optimizers import OPTIMIZERS, optimizer_name
from trainer.schema.option_reading import Given, Reading, read_options
from trainer.schema.option_status import literals
from trainer.schema.options import Options
from trainer.schema.schedules import SCHEDULES, num_steps_of, parse_step_rules
from trainer.schema.trained_counts import optimizer_state_bytes


def read(**values: object) -> Reading:
    return read_options({name: Given(value, f"--{name}") for name, value in values.items()})


def problem(**values: object) -> Problem:
    problems = read(**values).problems
    assert len(problems) == 1, problems
    return problems[0]


def notes(**values: object) -> list[str]:
    reading = read(network_module="networks.lora_flux", **values)
    assert reading.options is not None, reading.problems
    return list(reading.notes)


FP16 = {"full_fp16": True, "mixed_precision": "fp16"}


def test_the_options_name_every_known_optimizer_and_schedule() -> None:
    fields = typing.get_type_hints(Options, include_extras=True)
    assert set(literals(fields["optimizer_type"])) == set(OPTIMIZERS)
    assert set(literals(fields["lr_scheduler"])) == set(SCHEDULES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_known_names_are_spelt_in_any_case(name: str) -> None:
    assert optimizer_name(f" {name.upper()} ") == name


@pytest.mark.parametrize(
    ("values", "field", "pieces"),
    [
        ({"optimizer_type": "pordigy"}, "optimizer_type", "did you mean Prodigy?"),
        ({"optimizer_type": "some package.X"}, "optimizer_type", "a dotted path"),
        ({"use_8bit_adam": True, "optimizer_type": "Lion"}, "use_8bit_adam", "contradicts optimizer_type Lion"),
        ({"use_8bit_adam": True, "use_lion_optimizer": True}, "use_lion_optimizer", "contradicts use_lion_optimizer"),
        ({"optimizer_type": "Lion", "optimizer_args": ["eps=1"]}, "optimizer_args", "Lion has no setting eps"),
        ({"use_lion_optimizer": True, "optimizer_args": ["betas=(0.9,)"]}, "optimizer_args", "must be two numbers"),
        ({"optimizer_type": "DAdaptAdan", "optimizer_args": ["betas=(0.9,0.9)"]}, "optimizer_args", "three numbers"),
        ({"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=0"]}, "optimizer_args", "True or False"),
        ({"optimizer_type": "Prodigy", "optimizer_args": ["d_coeff=2"]}, "optimizer_args", "Did you mean d_coef?"),
        ({"optimizer_type": "Prodigy", "optimizer_args": ["d0=0"]}, "optimizer_args", "above 0"),
        (
            {"optimizer_type": "Prodigy", "learning_rate": 1, "text_encoder_lr": 0.5},
            "learning_rate",
            "one rate for all, but there are several: 1, 0.5",
        ),
        (
            {"optimizer_type": "Prodigy", "learning_rate": 1, "network_args": ["loraplus_lr_ratio=4"]},
            "learning_rate",
            "loraplus_lr_ratio=4",
        ),
        ({"optimizer_type": "AdamWScheduleFree", "scale_weight_norms": 1}, "scale_weight_norms", "averages"),
        ({**FP16, "optimizer_type": "AdamWScheduleFree"}, "optimizer_type", "with full_fp16 AdamWScheduleFree divides"),
        ({**FP16, "optimizer_type": "adam", "optimizer_args": ["eps=1e-6"]}, "optimizer_type", "eps=0.0001"),
        ({**FP16, "optimizer_args": ["foreach=True"]}, "optimizer_type", "its eps is 0 in fp16"),
        ({**FP16, "optimizer_type": "torch.optim.AdamW"}, "optimizer_type", "its eps is 0 in fp16"),
        ({"lr_warmup_steps": 5}, "lr_warmup_steps", "constant has no warm-up"),
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_warmup_steps": 5}, "lr_warmup_steps", "has no warm-up"),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 5}, "lr_warmup_steps", "no warm-up of its own"),
        ({"lr_scheduler": "adafactor"}, "lr_scheduler", "belongs to optimizer_type Adafactor"),
        (
            {"lr_scheduler": "adafactor", "optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
            "lr_scheduler",
            "with relative_step",
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_min_lr_ratio", "needs its lowest rate"),
        (
            {
                "lr_scheduler": "cosine_with_min_lr",
                "lr_scheduler_min_lr_ratio": 0.1,
                "lr_scheduler_args": ["min_lr=1e-5"],
            },
            "lr_scheduler_min_lr_ratio",
            "twice",
        ),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler_args", "needs its rules"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:20,0.1:10,0.01"]},
            "lr_scheduler_args",
            'rules such as "1:100,0.1:200,0.01"',
        ),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["min_lr=1"]}, "lr_scheduler_args", "has no setting min_lr"),
    ],
)
def test_what_cannot_be_is_one_problem(values: dict[str, object], field: str, pieces: str) -> None:
    found = problem(**values)
    assert found.field == field
    assert pieces in str(found)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"use_lion_optimizer": True}, "use_lion_optimizer is an old name of --optimizer_type=Lion"),
        (
            {"optimizer_type": "Prodigy"},
            "Prodigy finds its own rate and takes learning_rate as a factor on it: 2e-06 is",
        ),
        ({"optimizer_type": "DAdaptLion", "learning_rate": 0.1}, "DAdaptLion finds its own rate"),
        ({"optimizer_type": "Adafactor"}, "Adafactor with relative_step sets its own rate"),
        (
            {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False", "warmup_init=True"]},
            "Adafactor's warmup_init turns relative_step on",
        ),
        (
            {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
            "Adafactor clips by itself (clip_threshold); --max_grad_norm=0 is usual with it",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"},
            "lr_scheduler has no effect: AdamWScheduleFree does without a schedule",
        ),
        (
            {"optimizer_type": "prodigyplus.ProdigyPlusScheduleFree", "learning_rate": 1, "lr_warmup_steps": 5},
            "lr_warmup_steps has no effect: prodigyplus.ProdigyPlusScheduleFree does without",
        ),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_type": "StepLR"},
            "lr_scheduler has no effect: lr_scheduler_type StepLR wins",
        ),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_power": 2},
            "lr_scheduler_power has no effect: lr_scheduler cosine does not use it",
        ),
        ({"lr_decay_steps": 5}, "lr_decay_steps has no effect: lr_scheduler constant does not use it"),
        ({"lr_scheduler": "warmup_stable_decay"}, "lr_scheduler warmup_stable_decay never decays"),
        ({"fused_backward_pass": True}, "fused_backward_pass has no effect: a LoRA's gradients are too small"),
    ],
)
def test_what_has_no_effect_or_is_unusual_is_one_line(values: dict[str, object], line: str) -> None:
    assert [note for note in notes(**values) if note.startswith(line)], notes(**values)


def test_usual_settings_need_no_line() -> None:
    assert notes(optimizer_type="Prodigy", learning_rate=1, network_train_unet_only=True) == []
    assert notes(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=3, lr_warmup_steps=10) == []
    assert notes(lr_scheduler="polynomial", lr_scheduler_power=2) == []


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("AdamW", []),
        ("AdamW8bit", []),
        ("Lion", []),
        ("Adam", ["fused=True"]),
        ("AdamWScheduleFree", ["eps=1e-4"]),
        ("AdamW", ["foreach=True", "eps=1e-4"]),
    ],
)
def test_optimizers_that_full_fp16_leaves_finite(optimizer: str, arguments: list[str]) -> None:
    assert read(**FP16, optimizer_type=optimizer, optimizer_args=arguments).problems == ()


def test_adafactors_own_schedule_is_written_as_such_and_can_be_read_again() -> None:
    options = read(optimizer_type="adafactor", lr_scheduler="cosine", lr_warmup_steps=3).options
    assert options is not None
    assert (options.lr_scheduler, options.lr_warmup_steps) == ("adafactor", 0)
    again = read(optimizer_type=options.optimizer_type, lr_scheduler="adafactor:2e-6").options
    assert again is not None
    assert again.lr_scheduler == "adafactor"


def test_a_number_of_steps_below_one_is_a_part_of_the_run() -> None:
    assert [num_steps_of(value, 200) for value in (0.1, 0, 30)] == [20, 0, 30]
    assert parse_step_rules("1:100, 0.1:200, 0.01") == ([(100, 1.0), (200, 0.1)], 0.01)


def test_the_estimate_knows_how_much_each_optimizer_keeps() -> None:
    sizes = {name: OPTIMIZERS[name].num_moments for name in ("AdamW", "Lion", "Lion8bit", "Prodigy")}
    assert sizes == {"AdamW": 2, "Lion": 1, "Lion8bit": 1, "Prodigy": 4}
    assert optimizer_state_bytes(25_600, is_8bit=True, num_moments=1) == 25_600 + 4 * 100
    assert optimizer_state_bytes(25_600, is_8bit=False, num_moments=4) == 16 * 25_600 + 4  # and the step count
