"""The device's peak for the step reports, and once in a run the calibration of the estimate by it."""

from __future__ import annotations

from collections.abc import Callable

from trainer.offload.block_swap import BlockSwap
from trainer.schema.calibration import measurement_of, write_calibration
from trainer.train.check import CheckedRun
from trainer.train.engine import Engine
from trainer.train.plan import estimate_run
from trainer.train.reporting import Reporter


class MeasuredPeak:
    """Called after each step, gives the peak. As soon as the largest batch must have been trained on, which with pictures
    of one size is the first step, else the first epoch's last, it is written down beside the estimate."""

    def __init__(self, checked: CheckedRun, engine: Engine, reporter: Reporter, swap: BlockSwap) -> None:
        self._checked = checked
        self._reporter = reporter
        self._swap = swap
        self._device, self._total_bytes = engine.name(), engine.total_bytes()
        self._peak: Callable[[], int] = engine.peak_bytes
        sizes = {
            (dataset.spec.batch_size, *size) for dataset in checked.index.datasets for size in dataset.bucket_counts
        }
        self._num_left = 1 if len(sizes) == 1 else checked.schedule.steps_per_epoch
        if not engine.is_main:
            self._num_left = 0
        engine.reset_peak()

    def __call__(self) -> int:
        peak = self._peak()
        if self._num_left > 0:
            self._num_left -= 1
            if self._num_left == 0 and peak and self._total_bytes is not None:
                self._write(peak, self._total_bytes)
        return peak

    def _write(self, peak: int, total_bytes: int) -> None:
        result = estimate_run(self._checked, blocks_to_swap=self._swap.blocks_to_swap)
        by_name = {phase.name: phase.peak_bytes for phase in result.phases}
        if by_name.get("sampling", 0) >= by_name["training"]:
            return  # the peak may be that of a sample
        measured = measurement_of(result, device=self._device, total_bytes=total_bytes, measured_bytes=peak)
        try:
            write_calibration(measured)
        except OSError as error:
            self._reporter.warning(f"the measured memory cannot be kept: {error.strerror or error}")
            return
        self._reporter.note(
            f"measured: the estimate of the training's memory was {measured.error:+.1%} off; later estimates for "
            f"{self._device} multiply activations by {measured.factor:.2f}"
        )
