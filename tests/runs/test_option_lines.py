"""Every option without effect and every refused one, through the command itself: the exact line that the user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.in_process import answer, small_run, words_of
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.schema.base import OptionStatus
from trainer.schema.option_status import STATUS

pytestmark = pytest.mark.timeout(120)

VALUES = {"text": "a", "path": "a", "integer": "7", "number": "7.5", "steps": "7"}


def word(name: str) -> str:
    """The option with a value that is not its default."""
    status = STATUS[name]
    if status.value_type == "flag":
        return f"--{name}"
    others = [choice for choice in status.choices if choice != str(status.default)]
    return f"--{name}={others[0] if others else VALUES[status.value_type]}"


def with_status(status: str) -> list[str]:
    return [name for name, entry in STATUS.items() if entry.status == status]


def refusal_line(name: str, status: OptionStatus) -> str:
    """What is wrong, the place, and the alternative, from the table's reason."""
    what, _, hint = status.reason.partition("; ")
    text = f"{name} {what.removeprefix('it ')}" if what.startswith("it ") else f"{name} cannot be used: {what}"
    return f"{text} (--{name})." + (f" {hint[0].upper()}{hint[1:]}." if hint else "")


def test_options_without_effect_are_named_in_the_block_at_the_start(tiny_models: TinyModels, tmp_path: Path) -> None:
    options = small_run(tiny_models, make_tiny_dataset(tmp_path, count=1), tmp_path / "output")
    names = with_status("inert")
    found = answer("check", *words_of(options), *(word(name) for name in names))
    assert found.code == 0, found.output
    _, _, block = found.output.partition("of these options:\n")
    lines = block.splitlines()
    for name in names:
        assert f"  - {name} has no effect: {STATUS[name].reason}" in lines, name


def test_refused_options_are_each_one_line_and_all_are_named_at_once(tiny_models: TinyModels, tmp_path: Path) -> None:
    options = small_run(tiny_models, make_tiny_dataset(tmp_path, count=1), tmp_path / "output")
    names = with_status("refused")
    found = answer(*words_of(options), *(word(name) for name in names))
    assert found.code == 2, found.output
    assert sorted(found.problems) == sorted(refusal_line(name, STATUS[name]) for name in names)


def test_refused_values_are_named_with_what_to_use(tiny_models: TinyModels, tmp_path: Path) -> None:
    options = small_run(tiny_models, make_tiny_dataset(tmp_path, count=1), tmp_path / "output")
    pairs = [(name, value) for name, status in STATUS.items() for value in status.refused_values]
    assert pairs
    # One value of each option at a time: the last of repeated options counts.
    while pairs:
        turn = dict(reversed(pairs))
        pairs = [pair for pair in pairs if pair not in turn.items()]
        found = answer(*words_of({**options, **turn}))
        assert found.code == 2, found.output
        for name, value in turn.items():
            what, _, hint = STATUS[name].refused_values[value].partition("; ")
            (line,) = [line for line in found.problems if line.startswith(f"{name} {value} {what} (--{name}).")]
            assert hint.lower().rstrip(".") in line.lower()


def test_settings_about_what_is_not_there_are_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    dataset = make_tiny_dataset(tmp_path, count=2)
    sorted(tmp_path.rglob("*.txt"))[0].write_text("a red circle " * 50, encoding="utf-8")
    options = small_run(tiny_models, dataset, tmp_path / "output") | {
        "pretrained_model_name_or_path": str(tiny_models.flux_schnell),
        "t5xxl_max_token_length": "16",
        "guidance_scale": "2",
        "prior_loss_weight": "0.5",
        "ddp_timeout": "5",
        "validation_seed": "3",
    }
    found = answer("check", *words_of(options), "--alpha_mask", "--resolution=768")
    assert found.code == 0, found.output
    for line in (
        "guidance_scale has no effect: this model, as schnell, takes none",
        "prior_loss_weight has no effect: there are no regularisation pictures",
        "ddp_timeout has no effect: there is one process",
        "validation_seed has no effect: no picture is held back (validation_split)",
        f"alpha_mask of {tmp_path / 'images'} has no effect: no picture is transparent",
        "resolution 768 has no effect: the dataset file says otherwise everywhere",
    ):
        assert f"  - {line}\n" in found.output, line
    assert "have more than T5's 16 tokens and lose their ends" in found.output
