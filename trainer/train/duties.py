"""What falls due after a step: saves, validation, samples, in a fixed order that a resumed run goes on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from trainer.schema.base import UserError
from trainer.train.gradient_sync import Wishes
from trainer.train.learning_rate import LearningRateSchedule
from trainer.train.mean_loss import MeanLoss
from trainer.train.optim import final_weights
from trainer.train.progress import DUTIES, Duty, Progress
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.step_position import LoopSettings, SaveKind, StepPosition


class Duties:
    """Does what falls due. `num_done` of `DUTIES` are done after the last step; `wishes` are those of that step."""

    def __init__(
        self,
        settings: LoopSettings,
        position: StepPosition,
        *,
        num_done: int,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LearningRateSchedule,
        num_processes: int,
        reporter: Reporter,
        average: MeanLoss,
        progress: Callable[[], Progress],
        save: Callable[[StepPosition, Literal["step", "epoch"]], None],
        sample: Callable[[StepPosition, bool], None],
        validate: Callable[[], float] | None,
        save_state: Callable[[Progress, SaveKind], None],
        make_room: Callable[[str, str], None] | None,
    ) -> None:
        self.num_done = num_done
        self.wishes = Wishes()
        self._settings = settings
        self._position = position
        self._network = network
        self._optimizer = optimizer
        self._schedule = schedule
        self._num_processes = num_processes
        self._reporter = reporter
        self._average = average
        self._progress = progress
        self._save = save
        self._sample = sample
        self._validate = validate
        self._validated: tuple[int, float] | None = None
        self._save_state = save_state
        self._make_room = make_room

    def do(self, position: StepPosition, *, is_epoch_end: bool) -> None:
        """Does what falls due after the step and is not done yet, in the order of `DUTIES`."""
        self._position = position
        for number, duty in enumerate(DUTIES):
            if number < self.num_done:
                continue
            if duty.startswith("step") or is_epoch_end:
                self._do_duty(duty, number + 1)
            self.num_done = number + 1
        self.wishes = Wishes()

    def _do_duty(self, duty: Duty, num_done: int) -> None:
        settings, position = self._settings, self._position
        match duty:
            case "step save":
                every = settings.save_every_n_steps
                is_due = self.wishes.save or bool(every and position.step % every == 0)
                if is_due:
                    self._save_now("step")
                # A state says that what is saved along with it is done: who resumes from it goes on behind it.
                self.num_done = num_done
                if is_due or self.wishes.state:
                    self._save_state_now("step" if is_due else "moment")
            case "step validation":
                every = settings.validate_every_n_steps
                if self._validate is not None and every and position.step % every == 0:
                    self._validate_now(self._validate, is_epoch_end=False)
            case "step sample":
                every = settings.sample_every_n_steps if settings.sample_every_n_epochs is None else None
                if self.wishes.sample or (every is not None and position.step % every == 0):
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
                    self.num_done = num_done
                    self._save_state_now("epoch")
            case "epoch sample":
                every = settings.sample_every_n_epochs
                if every and position.epoch % every == 0:
                    self._sample_now(is_epoch_end=True)

    def _save_state_now(self, kind: SaveKind) -> None:
        try:
            self._save_state(self._progress(), kind)
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

    def sample_before_training(self) -> None:
        self._sample_now(is_epoch_end=False)

    def _sample_now(self, *, is_epoch_end: bool) -> None:
        try:
            with final_weights(self._optimizer):
                self._sample(self._position, is_epoch_end)
        except UserError as error:
            self._reporter.warning(f"no sample was made: {error}")
        except StopRequested:
            # Only the main process samples; the others learn of the stop when gradients are averaged next.
            if self._num_processes == 1:
                raise
        self._network.train()
        self._reporter.phase("training")
