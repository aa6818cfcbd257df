"""What a step really needed on a device, and how later estimates follow it.

After the first step on a GPU the allocator's peak is written beside the estimate, one entry for each device name. Weights,
LoRA, gradients and optimizer state are counted exactly, so that what is corrected is the rest: activations and the work
around them, by the factor between what was measured of them and what was estimated. The file is `calibration.json` in the
data folder; one that cannot be read counts as none, and is replaced.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

from trainer.schema.folders import data_home
from trainer.schema.memory import Estimate
from trainer.schema.memory_phases import Phase
from trainer.schema.run_folder import write_atomic

CALIBRATION_FILE: Final = "calibration.json"
FACTOR_RANGE: Final = (0.5, 2.0)
"""A factor beyond this says that something else was measured; it is cut there."""
_SAME_SIZE: Final = 0.03
_NOT_MEASURED: Final = ("CUDA context", "allocator rounding")
"""Parts that are not in the allocator's count of what is allocated."""
_EXACT: Final = ("weights", "lora", "optimizer", "gradients")


@dataclass(frozen=True)
class Measurement:
    """One step on a device: the allocator's peak, and of the estimate for it what is exact and the rest."""

    device: str
    total_bytes: int
    measured_bytes: int
    exact_bytes: int
    other_bytes: int
    when: float = 0.0

    @property
    def factor(self) -> float:
        """By which the rest of an estimate is multiplied."""
        if self.other_bytes <= 0:
            return 1.0
        low, high = FACTOR_RANGE
        return min(max((self.measured_bytes - self.exact_bytes) / self.other_bytes, low), high)

    @property
    def error(self) -> float:
        """How far the estimate was off, as a part of what was measured: above 0 when it was too high."""
        return (self.exact_bytes + self.other_bytes) / self.measured_bytes - 1


def measurement_of(result: Estimate, *, device: str, total_bytes: int, measured_bytes: int) -> Measurement:
    """The measured peak of a training step beside its estimate, which must be one without calibration."""
    training = next(phase for phase in result.phases if phase.name == "training")
    exact, other = _exact_and_other(training)
    return Measurement(device, total_bytes, measured_bytes, exact, other, time.time())


def _exact_and_other(training: Phase) -> tuple[int, int]:
    exact = sum(part.bytes for part in training.parts if part.kind in _EXACT)
    other = sum(part.bytes for part in training.parts if part.kind not in _EXACT and part.name not in _NOT_MEASURED)
    return exact, other


def calibration_path() -> Path:
    return data_home() / CALIBRATION_FILE


def read_calibrations() -> dict[str, Measurement]:
    """All measurements by device name."""
    try:
        entries: Any = json.loads(calibration_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, Measurement] = {}
    for name, entry in cast("Mapping[str, Any]", entries if isinstance(entries, dict) else {}).items():
        try:
            sizes = [entry[key] for key in ("total_bytes", "measured_bytes", "exact_bytes", "other_bytes")]
            if all(isinstance(size, int) and size > 0 for size in sizes):
                found[name] = Measurement(name, *sizes, when=float(entry["when"]))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def write_calibration(measurement: Measurement) -> None:
    """Keeps the measurement as its device's only one. Raises `OSError` where the data folder cannot be written."""
    entries = {name: asdict(one) for name, one in read_calibrations().items()}
    entries[measurement.device] = asdict(measurement)
    path = calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(entries, indent=1))


def calibration_for(device: str | None, total_bytes: int | None) -> Measurement | None:
    """The measurement of a device by its name, or where only its memory is known the one of a device of that size."""
    known = read_calibrations()
    if device is not None:
        return known.get(device)
    if total_bytes is None:
        return None
    near = [one for one in known.values() if abs(one.total_bytes / total_bytes - 1) <= _SAME_SIZE]
    return max(near, key=lambda one: one.when, default=None)
