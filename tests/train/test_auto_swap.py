"""`--blocks_to_swap=auto` and the calibration, with devices of given sizes around a real, checked run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.runs.in_process import small_run, words_of
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.model.transformer import load_transformer
from trainer.offload.block_swap import BlockSwap
from trainer.offload.mover import HostMover
from trainer.schema.calibration import read_calibrations
from trainer.schema.cli import read_command_line
from trainer.schema.memory import RESERVE_SHARE
from trainer.schema.memory_phases import CUDA_CONTEXT_BYTES, GIB
from trainer.train.auto_swap import resolve_auto_swap
from trainer.train.check import CheckedRun, check_run
from trainer.train.engine import Engine
from trainer.train.measured_peak import MeasuredPeak
from trainer.train.plan import estimate_run
from trainer.train.reporting import Reporter


@dataclass(frozen=True)
class Card(Engine):
    """A device of a given size, of which a given part is free and was in use at most."""

    total: int = 0
    free: int = 0
    peak: int = 0

    def total_bytes(self) -> int | None:
        return self.total

    def free_bytes(self) -> int | None:
        return self.free

    def peak_bytes(self) -> int:
        return self.peak

    def name(self) -> str:
        return "test card"


class Notes(Reporter):
    def __init__(self) -> None:
        super().__init__(is_main=False)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warning(self, text: str) -> None:
        self.lines.append(text)


def engine(kind: type[Engine] = Engine, **changes: int) -> Engine:
    return kind(torch.device("cpu"), torch.float32, 0, 1, lambda tensor: tensor, **changes)  # pyright: ignore[reportCallIssue]


@pytest.fixture
def checked(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckedRun:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    words = small_run(tiny_models, make_tiny_dataset(tmp_path, count=2), tmp_path / "out")
    # With many values to train nothing needs more than the training.
    words |= {"device": "auto", "blocks_to_swap": "auto", "network_dim": "256", "train_batch_size": "2"}
    return check_run(read_command_line(words_of(words)), Reporter(is_main=False))


def test_in_main_memory_auto_is_none_and_says_why(checked: CheckedRun) -> None:
    notes = Notes()
    assert resolve_auto_swap(checked, engine(), notes).options.blocks_to_swap == 0
    assert notes.lines == ["blocks_to_swap auto is 0: cpu computes in main memory, where nothing is swapped"]


def test_on_a_card_auto_is_the_smallest_count_that_fits_what_is_free(checked: CheckedRun) -> None:
    peaks = [estimate_run(checked, blocks_to_swap=count).peak_bytes for count in range(5)]
    assert peaks[4] < peaks[3] < peaks[2] < peaks[0]
    card = math.ceil(peaks[3] / (1 - RESERVE_SHARE)) + 2
    notes = Notes()
    resolved = resolve_auto_swap(checked, engine(Card, total=24 * GIB, free=card - CUDA_CONTEXT_BYTES), notes)
    assert resolved.options.blocks_to_swap == 3
    assert any(line.startswith("blocks_to_swap auto is 3: about ") for line in notes.lines)
    roomy = resolve_auto_swap(checked, engine(Card, total=24 * GIB, free=20 * GIB), Notes())
    assert roomy.options.blocks_to_swap == 0
    tight = resolve_auto_swap(checked, engine(Card, total=24 * GIB, free=GIB // 100), notes)
    assert tight.options.blocks_to_swap == 4
    assert any("With blocks_to_swap 4, " in line for line in notes.lines), "it says that it will probably not fit"
    assert resolve_auto_swap(resolved, engine(), Notes()) is resolved, "a number stays"


def test_the_first_step_on_a_card_is_kept_beside_its_estimate(checked: CheckedRun) -> None:
    path = checked.options.pretrained_model_name_or_path
    assert path is not None
    model = load_transformer(path, "flux", torch.float32, torch.device("cpu"), device_of=None)
    swap = BlockSwap(list(model.double_blocks), list(model.single_blocks), 2, HostMover(torch.device("cpu")))
    result = estimate_run(checked, blocks_to_swap=2)
    notes = Notes()
    peak = MeasuredPeak(checked, engine(Card, total=8 * GIB, peak=result.peak_bytes), notes, swap)
    assert read_calibrations() == {}
    assert [peak(), peak()] == [result.peak_bytes] * 2
    (kept,) = read_calibrations().values()
    assert (kept.device, kept.total_bytes, kept.measured_bytes) == ("test card", 8 * GIB, result.peak_bytes)
    assert len(notes.lines) == 1
    assert notes.lines[0].startswith("measured: the estimate of the training's memory was -")

    on_cpu = MeasuredPeak(checked, engine(), Notes(), swap)
    on_cpu()
    assert list(read_calibrations()) == ["test card"], "a CPU has no peak of its own"
