"""The step loop: micro-steps, accumulation, clipping, optimizer, schedule, and what falls due after a step.

The loop knows no options, model or data. It is given the loss of a micro-batch as a callable and what to do when a
save or a sample falls due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from trainer.train.duties import Duties
from trainer.train.gradient_sync import GradientSync, Wishes
from trainer.train.learning_rate import LearningRateSchedule
from trainer.train.level_losses import LevelLosses
from trainer.train.mean_loss import MeanLoss
from trainer.train.micro_batch import MicroBatch, NumbersLost
from trainer.train.optim import found_rates, group_rates
from trainer.train.optimizer_step import OptimizerStep
from trainer.train.progress import Progress
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.step_position import LoopSettings, SaveKind, StepPosition, step_generator

MAX_SKIPPED_STEPS = 24
"""Steps in a row that may fall out because gradients leave fp16's range; each halves the loss scale."""

_BYTES_POLL_STEPS = 10
"""Host memory is read every this many steps; reading it costs a system call."""


class TrainingLoop:
    """Runs the steps. `micro_batches(epoch, skipped)` yields callables that give the loss of one micro-batch, those of
    an epoch without its first `skipped` ones.

    `before_step` is called when the gradients of an optimizer step are complete and clipped, `after_step` when the
    weights are changed; what it gives is logged.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LearningRateSchedule,
        scaler: torch.amp.GradScaler,
        sync: GradientSync,
        reporter: Reporter,
        rank: int,
        micro_batches: Callable[[int, int], Iterator[MicroBatch]],
        save: Callable[[StepPosition, Literal["step", "epoch"]], None],
        sample: Callable[[StepPosition, bool], None],
        peak_bytes: Callable[[], int],
        validate: Callable[[], float] | None = None,
        inspect_gradients: Callable[[int], None] | None = None,
        before_step: Callable[[], Mapping[str, float]] = dict[str, float],
        after_step: Callable[[], Mapping[str, float]] = dict,
        start: Progress | None = None,
        save_state: Callable[[Progress, SaveKind], None] = lambda _progress, _kind: None,
        state_is_due: Callable[[], bool] = lambda: False,
        level_losses: LevelLosses | None = None,
        make_room: Callable[[str, str], None] | None = None,
    ) -> None:
        """`inspect_gradients(step)` is called with each step's gradients in place, averaged and not yet clipped.

        `start` is where an earlier run left off. `save_state` is called after each LoRA that is saved, and after a step
        at whose end `state_is_due()`; on every rank at the same steps. `make_room(what, reason)` is called when the device
        ran out of memory in a step or a validation, which is then computed again; it raises when there is none to make.
        """
        self._settings = settings
        self._before_step = before_step
        self._after_weights = after_step
        self._network = network
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._optimizer = optimizer
        self._schedule = schedule
        self._scaler = scaler
        self._sync = sync
        self._reporter = reporter
        self._rank = rank
        self._micro_batches = micro_batches
        self._peak_bytes = peak_bytes
        self._inspect_gradients = inspect_gradients
        start = start or Progress()
        self._state_is_due = state_is_due
        self._level_losses = level_losses or LevelLosses()
        self._make_room = make_room
        self._optimizer_step = OptimizerStep(optimizer, scaler, self._parameters, make_room)
        self._num_skipped_in_a_row = start.num_skipped_in_a_row
        self._average = MeanLoss(settings.steps_per_epoch, start.losses, start.loss_sum)
        self._position = settings.position_after(start.step)
        self._duties = Duties(
            settings,
            self._position,
            num_done=start.num_duties_done,
            network=network,
            optimizer=optimizer,
            schedule=schedule,
            num_processes=sync.num_processes,
            reporter=reporter,
            average=self._average,
            progress=lambda: self.progress,
            save=save,
            sample=sample,
            validate=validate,
            save_state=save_state,
            make_room=make_room,
        )
        self._host_bytes = 0
        self._process = psutil.Process()

    @property
    def progress(self) -> Progress:
        """How far the loop has come by now."""
        return Progress(
            step=self._position.step,
            num_duties_done=self._duties.num_done,
            losses=self._average.values,
            loss_sum=self._average.total,
            num_skipped_in_a_row=self._num_skipped_in_a_row,
        )

    def run(self) -> tuple[StepPosition, bool]:
        """Trains to the end or to a requested stop. Returns the last position and whether the run was stopped."""
        try:
            return self._run()
        except StopRequested:  # between two steps of a sample
            return self._position, True

    def _run(self) -> tuple[StepPosition, bool]:
        settings = self._settings
        first = self._position.step
        self._reporter.start_training(settings.num_steps, first)
        if settings.sample_at_first and first == 0:
            self._duties.sample_before_training()
        if first > 0:
            # What an interrupted run had still to do after its last step.
            self._duties.do(
                self._position, is_epoch_end=first % settings.steps_per_epoch == 0 or first >= settings.num_steps
            )
        while self._position.step < settings.num_steps:
            before = self._position.step
            epoch = before // settings.steps_per_epoch + 1
            for position, stopped in self._epoch(epoch, self._position.step):
                self._position = position
                if stopped:
                    return self._position, True
                is_last = position.step >= settings.num_steps
                self._duties.do(position, is_epoch_end=is_last or position.step % settings.steps_per_epoch == 0)
                if is_last:
                    break
            if self._position.step == before:
                raise ValueError(f"epoch {epoch} has no micro-batches left")
        return self._position, False

    def _epoch(self, epoch: int, step: int) -> Iterator[tuple[StepPosition, bool]]:
        settings = self._settings
        self._reporter.note(f"epoch {epoch}/{settings.num_epochs}")
        skipped = (step - (epoch - 1) * settings.steps_per_epoch) * settings.num_micro_steps
        remaining = settings.micro_steps_per_epoch - skipped
        losses: list[Tensor] = []
        micro_batches: list[MicroBatch] = []
        started = time.monotonic()
        paused = self._reporter.paused_seconds
        stop = False
        # The last group of an epoch may hold fewer micro-steps; its mean is over those that it has.
        group = min(settings.num_micro_steps, remaining)
        self._network.train()
        for micro_batch in self._micro_batches(epoch, skipped):
            stop = self._reporter.should_stop() or stop
            if stop and self._sync.num_processes == 1:
                yield StepPosition(step, epoch), True
                return
            micro_batches.append(micro_batch)
            while len(losses) < len(micro_batches):
                which = len(losses)
                try:
                    losses.append(self._micro_step(micro_batches[which], step, which, group))
                    continue
                except torch.OutOfMemoryError as error:
                    if self._make_room is None:
                        raise
                    reason = str(error)
                # Outside of the handler, which keeps the tensors of the failed pass alive. All of the step's gradients
                # come anew: it is not known which of them the failed pass has touched.
                losses.clear()
                self._level_losses.clear()
                self._optimizer.zero_grad(set_to_none=True)
                self._make_room(f"step {step + 1}", reason)
            if len(losses) < group:
                continue
            remaining -= group
            group = min(settings.num_micro_steps, remaining)
            stop = self._update(StepPosition(step, epoch), losses, micro_batches, started, paused, stop=stop)
            step += 1
            losses, micro_batches = [], []
            yield StepPosition(step, epoch), stop
            if stop:
                return
            started = time.monotonic()
            paused = self._reporter.paused_seconds

    def _micro_step(self, micro_batch: MicroBatch, step: int, which: int, group: int) -> Tensor:
        """Adds the gradients of one micro-batch. A function of the position: called again, it does the same."""
        generator = step_generator(self._settings.seed, step, which, self._rank)
        # Dropout draws from the global generators: seeded per micro-step, they too are a function of the position.
        torch.manual_seed(generator.initial_seed())
        loss = micro_batch(generator)
        self._scaler.scale(loss / group).backward()
        return loss.detach()

    def _update(
        self,
        before: StepPosition,
        losses: Sequence[Tensor],
        micro_batches: Sequence[MicroBatch],
        started: float,
        paused: float,
        *,
        stop: bool,
    ) -> bool:
        position = StepPosition(before.step + 1, before.epoch)
        self._scaler.unscale_(self._optimizer)
        reporter = self._reporter
        wishes = Wishes(stop, reporter.take_save_request(), reporter.take_sample_request(), self._state_is_due())
        self._duties.wishes = self._sync(self._parameters, wishes)
        if self._inspect_gradients is not None:
            self._inspect_gradients(position.step)
        limit = self._settings.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self._parameters, limit if limit > 0 else math.inf))
        loss, levels = self._level_losses.read(torch.stack(list(losses)).mean())
        # Looked at before the optimizer's step: what is no number never gets into the weights.
        if not math.isfinite(loss) or (not math.isfinite(norm) and not self._may_skip()):
            raise self._numbers_lost(before, losses, micro_batches, loss, norm)
        more: Mapping[str, float] = {}
        if math.isfinite(norm):
            self._num_skipped_in_a_row = 0
            measured = self._before_step()
            self._optimizer_step()
            self._scaler.update()
            more = {**measured, **self._after_weights()}
        else:
            self._skip(position)
        rates = group_rates(self._optimizer)
        more = {**more, **self._rate_scalars(rates)}
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._duties.num_done = 0
        self._report(position, loss, levels, norm, rates, started, paused, more)
        return self._duties.wishes.stop

    def _may_skip(self) -> bool:
        """Whether gradients that are no numbers may only mean that the loss scale is too large for fp16."""
        return self._scaler.is_enabled() and self._num_skipped_in_a_row < MAX_SKIPPED_STEPS

    def _skip(self, position: StepPosition) -> None:
        """Leaves the weights and halves the scale, on every rank: the gradients are the same on all of them."""
        scale = self._scaler.get_scale()
        self._num_skipped_in_a_row += 1
        self._scaler.update(scale / 2)
        self._reporter.note(
            f"step {position.step} changed nothing: its gradients left fp16's range at loss scale {scale:g}; "
            f"from now on it is {scale / 2:g}"
        )

    def _numbers_lost(
        self,
        before: StepPosition,
        losses: Sequence[Tensor],
        micro_batches: Sequence[MicroBatch],
        loss: float,
        norm: float,
    ) -> NumbersLost:
        which = next((index for index, value in enumerate(losses) if not value.isfinite()), len(losses) - 1)
        step = before.step + 1
        is_loss = not math.isfinite(loss)
        what = f"the loss became {loss}" if is_loss else f"the gradient's norm became {norm}"
        return NumbersLost(
            f"{what} at step {step}",
            position=before,
            micro_batch=micro_batches[which],
            generator=step_generator(self._settings.seed, before.step, which, self._rank),
        )

    def _report(
        self,
        position: StepPosition,
        loss: float,
        levels: Sequence[float | None] | None,
        norm: float,
        rates: Sequence[float],
        started: float,
        paused: float,
        more: Mapping[str, float],
    ) -> None:
        average = self._average.add(loss)
        if position.step % _BYTES_POLL_STEPS == 1 or self._host_bytes == 0:
            self._host_bytes = int(self._process.memory_info().rss)
        scalars = {"loss/current": loss, "loss/average": average, "norm/grad_norm": norm, **more}
        if self._scaler.is_enabled():
            scalars["norm/loss_scale"] = self._scaler.get_scale()
        self._reporter.step(
            step=position.step,
            epoch=position.epoch,
            loss=loss,
            loss_average=average,
            **({} if levels is None else {"level_losses": levels}),
            lr=rates[0],
            step_seconds=time.monotonic() - started - (self._reporter.paused_seconds - paused),
            peak_bytes=self._peak_bytes(),
            host_bytes=self._host_bytes,
            grad_norm=norm if math.isfinite(norm) else None,
            scalars=scalars,
        )

    def _rate_scalars(self, rates: Sequence[float]) -> dict[str, float]:
        """Each group's rate under the reference's names: by what it trains, and by number."""
        scalars: dict[str, float] = {}
        names = [str(group.get("name", "unet")) for group in self._optimizer.param_groups]
        for prefix, values in (("lr/", rates), ("lr/d*lr/", found_rates(self._optimizer) or ())):
            # Strict is wrong here: an optimizer that finds no rate has none to show.
            for index, (name, value) in enumerate(zip(names, values, strict=False)):
                scalars[f"{prefix}{name}"] = value
                scalars[f"{prefix}group{index}"] = value
        return scalars
