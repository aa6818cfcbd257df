"""The step loop: micro-steps, accumulation, clipping, optimizer, schedule, and what falls due after a step.

The loop knows no options, model or data. It is given the loss of a micro-batch as a callable and what to do when a
save or a sample falls due.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from trainer.schema.base import UserError
from trainer.train.learning_rate import LearningRateSchedule
from trainer.train.level_losses import LevelLosses
from trainer.train.optim import final_weights, found_rates, group_rates
from trainer.train.optimizer_step import OptimizerStep
from trainer.train.progress import DUTIES, Duty, Progress
from trainer.train.reporting import Reporter, StopRequested

MicroBatch = Callable[[torch.Generator], Tensor]
"""Gives the loss of one micro-batch; everything random comes from the generator and torch's own."""


SaveKind = Literal["step", "epoch", "moment"]
"""When a state is saved: with a step's or an epoch's LoRA, or because one is due by the clock."""

MAX_SKIPPED_STEPS = 24
"""Steps in a row that may fall out because gradients leave fp16's range; each halves the loss scale."""

_BYTES_POLL_STEPS = 10
"""Host memory is read every this many steps; reading it costs a system call."""


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often. Steps are optimizer steps; `num_micro_steps` is the accumulation."""

    num_steps: int
    num_epochs: int
    micro_steps_per_epoch: int
    num_micro_steps: int
    max_grad_norm: float
    seed: int
    save_every_n_steps: int | None
    save_every_n_epochs: int | None
    sample_every_n_steps: int | None
    sample_every_n_epochs: int | None
    sample_at_first: bool
    validate_every_n_steps: int | None = None
    validate_every_n_epochs: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.micro_steps_per_epoch / self.num_micro_steps)

    def position_after(self, step: int) -> StepPosition:
        """Where a run is when `step` optimizer steps are done: still in the epoch that the last one belongs to."""
        return StepPosition(step, max(1, math.ceil(step / self.steps_per_epoch)))


@dataclass(frozen=True)
class StepPosition:
    """Where the run is after a step: `step` optimizer steps done, in `epoch` (1-based)."""

    step: int
    epoch: int


def step_generator(seed: int, step: int, micro_step: int, rank: int) -> torch.Generator:
    """The host generator of one micro-step: a function of its position, so resuming needs no stored state.

    Different on every rank, unlike the reference, where all ranks draw the same noise.
    """
    mixed = (seed * 1_000_003 + step * 8_191 + micro_step * 127 + rank * 31_337 + 0x5EED) % (2**63)
    return torch.Generator().manual_seed(mixed)


class NumbersLost(UserError):
    """A loss or a gradient is no number. The weights are still those of `position`, the last whole step.

    `micro_batch` with `generator` is what was computed; of several micro-steps the first whose loss is no number.
    """

    def __init__(
        self, what: str, *, position: StepPosition, micro_batch: MicroBatch, generator: torch.Generator
    ) -> None:
        super().__init__(
            what, hint="Lower learning_rate, or train with mixed_precision bf16. The weights are left as they were."
        )
        self.position = position
        self.micro_batch = micro_batch
        self.generator = generator


class MeanLoss:
    """The reference's `loss/average`: the mean over the last epoch's worth of steps, kept in constant time."""

    def __init__(self, window: int, values: Sequence[float] = (), total: float | None = None) -> None:
        """`values` are earlier losses, `total` their sum as it was kept: its last digits depend on those before them."""
        self._values: deque[float] = deque(values, maxlen=max(window, 1))
        self._sum = total if total is not None and len(self._values) == len(values) else math.fsum(self._values)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(self._values)

    @property
    def total(self) -> float:
        return self._sum

    @property
    def value(self) -> float:
        """The mean so far; NaN before the first step."""
        return self._sum / len(self._values) if self._values else math.nan

    def add(self, value: float) -> float:
        if len(self._values) == self._values.maxlen:
            self._sum -= self._values[0]
        self._values.append(value)
        self._sum += value
        return self.value


@dataclass(frozen=True)
class Wishes:
    """What is asked for after the step in progress, by commands, signals and clocks, which only some ranks have."""

    stop: bool = False
    save: bool = False
    sample: bool = False
    state: bool = False


class GradientSync:
    """Averages gradients over processes in one flat reduction; does nothing in a single process.

    `reduce` is accelerate's mean reduction of one tensor. The wishes travel along, so that every rank does the same
    after the same step: what one wishes, all do.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], num_processes: int) -> None:
        self._reduce = reduce
        self.num_processes = num_processes

    def __call__(self, parameters: Sequence[nn.Parameter], wishes: Wishes) -> Wishes:
        if self.num_processes == 1:
            return wishes
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flags = torch.tensor([float(flag) for flag in astuple(wishes)], device=gradients[0].device)
        flat = self._reduce(torch.cat([flags, *(g.detach().float().reshape(-1) for g in gradients)]))
        offset = len(flags)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            count = gradient.numel()
            parameter.grad = flat[offset : offset + count].view_as(gradient).to(gradient.dtype)
            offset += count
        return Wishes(*(share > 0 for share in flat[: len(flags)].tolist()))


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
        before_step: Callable[[], None] = lambda: None,
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
        self._save = save
        self._sample = sample
        self._peak_bytes = peak_bytes
        self._validate = validate
        self._validated: tuple[int, float] | None = None
        self._inspect_gradients = inspect_gradients
        start = start or Progress()
        self._save_state = save_state
        self._state_is_due = state_is_due
        self._level_losses = level_losses or LevelLosses()
        self._make_room = make_room
        self._optimizer_step = OptimizerStep(optimizer, scaler, self._parameters, make_room)
        self._wishes = Wishes()
        self._num_duties_done = start.num_duties_done
        self._num_skipped_in_a_row = start.num_skipped_in_a_row
        self._average = MeanLoss(settings.steps_per_epoch, start.losses, start.loss_sum)
        self._position = settings.position_after(start.step)
        self._host_bytes = 0
        self._process = psutil.Process()

    @property
    def progress(self) -> Progress:
        """How far the loop has come by now."""
        return Progress(
            step=self._position.step,
            num_duties_done=self._num_duties_done,
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
            self._sample_now(is_epoch_end=False)
        if first > 0:
            # What an interrupted run had still to do after its last step.
            self._do_duties(is_epoch_end=first % settings.steps_per_epoch == 0 or first >= settings.num_steps)
        while self._position.step < settings.num_steps:
            before = self._position.step
            epoch = before // settings.steps_per_epoch + 1
            for position, stopped in self._epoch(epoch, self._position.step):
                self._position = position
                if stopped:
                    return self._position, True
                is_last = position.step >= settings.num_steps
                self._do_duties(is_epoch_end=is_last or position.step % settings.steps_per_epoch == 0)
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
        self._wishes = self._sync(self._parameters, wishes)
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
            self._before_step()
            self._optimizer_step()
            self._scaler.update()
            more = self._after_weights()
        else:
            self._skip(position)
        rates = group_rates(self._optimizer)
        more = {**more, **self._rate_scalars(rates)}
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_duties_done = 0
        self._report(position, loss, levels, norm, rates, started, paused, more)
        return self._wishes.stop

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

    def _do_duties(self, *, is_epoch_end: bool) -> None:
        """Does what falls due after the step and is not done yet, in the order of `DUTIES`."""
        for number, duty in enumerate(DUTIES):
            if number < self._num_duties_done:
                continue
            if duty.startswith("step") or is_epoch_end:
                self._do_duty(duty, number + 1)
            self._num_duties_done = number + 1
        self._wishes = Wishes()

    def _do_duty(self, duty: Duty, num_done: int) -> None:
        settings, position = self._settings, self._position
        match duty:
            case "step save":
                every = settings.save_every_n_steps
                is_due = self._wishes.save or bool(every and position.step % every == 0)
                if is_due:
                    self._save_now("step")
                # A state says that what is saved along with it is done: who resumes from it goes on behind it.
                self._num_duties_done = num_done
                if is_due or self._wishes.state:
                    self._save_state_now("step" if is_due else "moment")
            case "step validation":
                every = settings.validate_every_n_steps
                if self._validate is not None and every and position.step % every == 0:
                    self._validate_now(self._validate, is_epoch_end=False)
            case "step sample":
                every = settings.sample_every_n_steps if settings.sample_every_n_epochs is None else None
                if self._wishes.sample or (every is not None and position.step % every == 0):
                    self._sample_now(is_epoch_end=False)
            case "epoch validation":
                self._reporter.epoch(position.epoch, mean_loss=self._average.value)
                if self._validate is None:
                    self._schedule.observe(self._average.value)
                elif position.epoch % (settings.validate_every_n_epochs or 1) == 0:
                    self._validate_now(self._validate, is_epoch_end=True)
            case "epoch save":
                every = settings.save_every_n_epochs
                if every and position.epoch % every == 0 and position.epoch < settings.num_epochs:
                    self._save_now("epoch")
                    self._num_duties_done = num_done
                    self._save_state_now("epoch")
            case "epoch sample":
                every = settings.sample_every_n_epochs
                if every and position.epoch % every == 0:
                    self._sample_now(is_epoch_end=True)

    def _save_state_now(self, kind: SaveKind) -> None:
        try:
            self._save_state(self.progress, kind)
        except UserError as error:
            self._reporter.warning(f"no state was saved: {error}")

    def _save_now(self, kind: Literal["step", "epoch"]) -> None:
        try:
            with final_weights(self._optimizer):
                self._save(self._position, kind)
        except UserError as error:
            # Space can be made while training goes on; ending here would lose the work since the last save.
            self._reporter.warning(f"nothing was saved: {error}")
        self._reporter.phase("training")

    def _validate_now(self, validate: Callable[[], float], *, is_epoch_end: bool) -> None:
        """Takes the validation loss, once for a step that ends an epoch as well."""
        step = self._position.step
        if self._validated is None or self._validated[0] != step:
            with final_weights(self._optimizer):
                self._validated = (step, self._in_room(validate))
            self._network.train()
            self._schedule.observe(self._validated[1])
            self._reporter.phase("training")
        self._reporter.validation(
            step=step,
            epoch=self._position.epoch,
            loss=self._validated[1],
            train_loss=self._average.value,
            is_epoch_end=is_epoch_end,
        )

    def _in_room(self, validate: Callable[[], float]) -> float:
        """The validation loss, taken again with more room where memory runs out."""
        while True:
            try:
                return validate()
            except torch.OutOfMemoryError as error:
                if self._make_room is None:
                    raise
                reason = str(error)
            self._make_room("the validation", reason)

    def _sample_now(self, *, is_epoch_end: bool) -> None:
        try:
            with final_weights(self._optimizer):
                self._sample(self._position, is_epoch_end)
        except UserError as error:
            self._reporter.warning(f"no sample was made: {error}")
        except StopRequested:
            # Only the main process samples; the others learn of the stop when gradients are averaged next.
            if self._sync.num_processes == 1:
                raise
        self._network.train()
        self._reporter.phase("training")
