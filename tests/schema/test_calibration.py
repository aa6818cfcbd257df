"""What was measured on a device corrects later estimates for it: with numbers as they would be recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.in_process import answer
from tests.schema.test_memory import dev_estimate, usual_options
from trainer.schema.calibration import (
    FACTOR_RANGE,
    Measurement,
    calibration_for,
    calibration_path,
    measurement_of,
    read_calibrations,
    write_calibration,
)
from trainer.schema.memory import estimate
from trainer.schema.memory_phases import GIB
from trainer.schema.memory_plan import plan_for
from trainer.schema.parameter_counts import PUBLISHED_DEV

CARD = "NVIDIA GeForce RTX 4090"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))


def recorded(measured_bytes: int, device: str = CARD, total_bytes: int = 24 * GIB) -> Measurement:
    return measurement_of(dev_estimate(18), device=device, total_bytes=total_bytes, measured_bytes=measured_bytes)


def allocated(factor: float = 1.0) -> int:
    """The allocator's part of the training's estimate, with another factor on what comes and goes."""
    result = estimate(
        PUBLISHED_DEV, usual_options(), width=1024, height=1024, batch_size=1, blocks_to_swap=18, factor=factor
    )
    (training,) = (phase for phase in result.phases if phase.name == "training")
    return sum(part.bytes for part in training.parts if part.name not in ("CUDA context", "allocator rounding"))


def test_an_estimate_that_was_right_changes_nothing() -> None:
    found = recorded(allocated())
    assert found.factor == pytest.approx(1)
    assert found.error == pytest.approx(0)


@pytest.mark.parametrize("factor", [0.8, 1.15, 1.6])
def test_with_the_factor_the_estimate_is_what_was_measured(factor: float) -> None:
    measured = allocated(factor)
    found = recorded(measured)
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert allocated(found.factor) == pytest.approx(measured, rel=1e-6)


def test_the_factor_carries_over_to_other_settings() -> None:
    """Measured at 1024 pixels with 18 blocks swapped; what is exact stays as it is."""
    found = recorded(allocated(1.3))
    for side, swap in ((512, 0), (768, 30)):
        plain, scaled = (
            estimate(
                PUBLISHED_DEV,
                usual_options(),
                width=side,
                height=side,
                batch_size=1,
                blocks_to_swap=swap,
                factor=factor,
            )
            for factor in (1.0, found.factor)
        )
        first, second = (next(p for p in result.phases if p.name == "training").split() for result in (plain, scaled))
        assert second["activations"] == pytest.approx(1.3 * first["activations"], rel=1e-6)
        assert {kind: first[kind] for kind in ("weights", "lora")} == {
            kind: second[kind] for kind in ("weights", "lora")
        }


def test_an_absurd_measurement_is_cut() -> None:
    assert recorded(23 * GIB).factor == FACTOR_RANGE[1]
    assert recorded(GIB).factor == FACTOR_RANGE[0]


def test_measurements_are_kept_by_device_and_found_by_name_or_size() -> None:
    assert calibration_for(CARD, None) is None
    first, other = recorded(allocated(1.2)), recorded(allocated(0.9), "NVIDIA RTX 3060", 12 * GIB)
    for measurement in (first, other):
        write_calibration(measurement)
    assert read_calibrations() == {CARD: first, "NVIDIA RTX 3060": other}
    assert calibration_for(CARD, None) == first
    assert calibration_for(None, round(12.2 * GIB)) == other
    assert calibration_for(None, 16 * GIB) is None
    assert calibration_for(None, None) is None
    newer = recorded(allocated(1.1))
    write_calibration(newer)
    assert calibration_for(CARD, 12 * GIB) == newer


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3}', '{"x": {"total_bytes": "many"}}', '{"x": {"other": 1}}'])
def test_a_damaged_file_counts_as_none_and_is_replaced(text: str) -> None:
    calibration_path().parent.mkdir(parents=True)
    calibration_path().write_text(text)
    assert read_calibrations() == {}
    write_calibration(recorded(allocated(1.2)))
    assert list(read_calibrations()) == [CARD]


def test_the_plan_and_the_command_use_it_and_say_so() -> None:
    measurement = recorded(allocated(1.5))
    write_calibration(measurement)
    options = usual_options(resolution="1024")
    plain, followed = (plan_for(options, 24 * GIB, calibration=one) for one in (None, measurement))
    assert followed.choice.blocks_to_swap > plain.choice.blocks_to_swap
    assert any(CARD in line for line in followed.assumptions)
    words = ("--mixed_precision=bf16", "--gradient_checkpointing", "--cache_latents", "--cache_text_encoder_outputs")
    for more in (("--vram_gb=24",), (f"--gpu={CARD}",)):
        assert f"activations as measured on {CARD}: 1.50 times" in answer("estimate", *words, *more).output
    assert "measured on" not in answer("estimate", *words, "--vram_gb=16").output
    unknown = answer("estimate", *words, "--gpu=GTX 9")
    assert unknown.code == 2
    assert f"Measured are: {CARD}." in unknown.output
