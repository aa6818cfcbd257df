"""Saves the state of a run where and when it is asked for, and sets everything back to it.

With `save_state` a state goes along with each LoRA, under the reference's names. A run folder keeps states of its own
besides, so that a run of the page can be resumed however it ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

from trainer.lora.lycoris import AnyNetwork
from trainer.schema.options import Options
from trainer.schema.run_folder import RUN_STATE, RunFolder
from trainer.train.checkpoint import CheckpointKind, numbered_pattern, superseded_number
from trainer.train.progress import DUTIES, Progress
from trainer.train.random_state import random_state, set_random_state
from trainer.train.reporting import Reporter
from trainer.train.state_folder import read_tensors, remove_states, run_state_name, state_name, write_state
from trainer.train.state_head import StateHead, damaged
from trainer.train.state_tree import pack, unpack
from trainer.train.step_position import SaveKind, StepPosition

FIRST_SECONDS: Final = 10.0
LAST_SECONDS: Final = 300.0
"""A run folder's own states lie as far apart as the run was long by then, but not closer and not farther than these: a
run that dies loses five minutes, and a short one half of its work."""
WRITING_SHARE: Final = 50
"""They also lie so many times as far apart as writing one takes: 2 % of the time at most."""


class Stateful(Protocol):
    """An optimizer, a schedule or a loss scale."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


class Steps(Stateful, Protocol):
    """A schedule."""

    def step(self) -> object: ...


@dataclass(frozen=True)
class Trainables:
    """Everything of one process that changes from step to step, the loop's own counters apart."""

    network: AnyNetwork
    optimizer: torch.optim.Optimizer
    schedule: Steps
    scaler: Stateful
    device: torch.device
    rank: int
    num_processes: int
    gather: Callable[[object], Sequence[object]]
    """Gives the values of all ranks on every rank."""


class StateSaver:
    """Writes states; on every rank at the same steps, as their random generators are stored too, by rank 0 alone.

    `identity` is what does not change during the run: see `trainer.train.resume`. `requested` are the steps whose LoRA
    somebody asked for, which are spared when old ones are removed. `upload` gets each folder as soon as it is written, a
    run folder's own ones apart.
    """

    def __init__(
        self,
        trained: Trainables,
        options: Options,
        identity: Mapping[str, object],
        reporter: Reporter,
        *,
        position_after: Callable[[int], StepPosition],
        requested: set[int],
        upload: Callable[[Path], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trained = trained
        self._options = options
        self._identity = identity
        self._reporter = reporter
        self._position_after = position_after
        self._requested = requested
        self._upload = upload
        self._clock = clock
        self._started_at = self._last_at = clock()
        self._writing_seconds = 0.0

    def is_due(self) -> bool:
        """Whether the run folder should get a state now. Without a run folder never; asked on every rank."""
        if self._options.run_dir is None or self._trained.rank != 0:
            return False
        age = min(max(self._last_at - self._started_at, FIRST_SECONDS), LAST_SECONDS)
        return self._clock() - self._last_at >= max(age, WRITING_SHARE * self._writing_seconds)

    def __call__(self, progress: Progress, kind: SaveKind) -> None:
        """The state that goes along with a step's or an epoch's LoRA, or is due by the clock."""
        position = self._position_after(progress.step)
        places: list[Path] = []
        if kind != "moment" and self._options.save_state:
            places.append(self._named(kind, position.epoch if kind == "epoch" else position.step))
        self._save(progress, places)
        if kind != "moment" and self._options.save_state:
            self._remove_superseded(kind, position)

    def save_stopped(self, progress: Progress) -> None:
        """The state of a run that was asked to stop."""
        asked = self._options.save_state or self._options.save_state_on_train_end
        self._save(progress, [self._named("step", progress.step)] if asked else [])

    def save_final(self, progress: Progress) -> None:
        """The state at the end, where it is asked for. A run folder's own ones are of no use any more."""
        options = self._options
        if options.save_state or options.save_state_on_train_end:
            self._save(progress, [self._named("final", 0)], in_run_folder=False)
        if options.run_dir is not None and self._trained.rank == 0:
            folder = RunFolder(options.run_dir).state_dir
            remove_states(folder, RUN_STATE, up_to=progress.step, keep=None, warn=self._reporter.warning)

    def _named(self, kind: CheckpointKind, number: int) -> Path:
        if self._options.output_dir is None:
            raise AssertionError("the checks demand an output folder")
        return self._options.output_dir / state_name(self._options.output_name, kind, number)

    def _save(self, progress: Progress, places: Sequence[Path], *, in_run_folder: bool = True) -> None:
        run_dir = self._options.run_dir
        own = None
        if run_dir is not None and in_run_folder:
            own = RunFolder(run_dir).state_dir / run_state_name(progress.step)
            places = [own, *places]
        if not places:
            return
        trained = self._trained
        generators = list(trained.gather(random_state(trained.device)))
        if trained.rank != 0:
            return
        self._reporter.phase("saving")
        started = self._clock()
        content, tensors = self._snapshot(progress, generators)
        position = self._position_after(progress.step)
        reference = {"current_epoch": position.epoch, "current_step": position.step}
        for place in places:
            write_state(place, content, tensors, reference)
            self._reporter.note(f"saved the state {place}")
            if self._upload is not None and place != own:
                self._upload(place)
        if own is not None:
            # Only now that a newer one is whole.
            remove_states(own.parent, RUN_STATE, up_to=progress.step, keep=own, warn=self._reporter.warning)
        self._last_at = self._clock()
        self._writing_seconds = self._last_at - started
        self._reporter.phase("training")

    def _snapshot(self, progress: Progress, generators: list[object]) -> tuple[dict[str, object], dict[str, Any]]:
        trained = self._trained
        position = self._position_after(progress.step)
        network, network_tensors = pack(trained.network.state_to_resume(), "network")
        optimizer, optimizer_tensors = pack(
            {"state": trained.optimizer.state_dict(), "defaults": trained.optimizer.defaults}, "optimizer"
        )
        generator, generator_tensors = pack(generators, "random")
        losses, _ = pack(list(progress.losses))
        schedule, schedule_tensors = pack(trained.schedule.state_dict(), "schedule")
        scaler, scaler_tensors = pack(trained.scaler.state_dict(), "scaler")
        content: dict[str, object] = {
            **self._identity,
            "saved_at": time.time(),
            "position": {
                "step": position.step,
                "epoch": position.epoch,
                # States are saved between steps, where every accumulation is complete.
                "micro_step": 0,
                "duties_done": list(DUTIES[: progress.num_duties_done]),
            },
            "loop": {
                "losses": losses,
                "loss_sum": progress.loss_sum,
                "num_skipped_in_a_row": progress.num_skipped_in_a_row,
            },
            "requested": sorted(self._requested),
            "network": network,
            "optimizer": optimizer,
            "schedule": schedule,
            "scaler": scaler,
            "random": generator,
        }
        tensors = {
            "network": network_tensors,
            "optimizer": {**optimizer_tensors, **schedule_tensors, **scaler_tensors},
            "random": generator_tensors,
        }
        return content, tensors

    def _remove_superseded(self, kind: SaveKind, position: StepPosition) -> None:
        options = self._options
        if self._trained.rank != 0 or kind == "moment":
            return
        if kind == "epoch":
            number, every = position.epoch, options.save_every_n_epochs
            keep_last = options.save_last_n_epochs_state or options.save_last_n_epochs
        else:
            number, every = position.step, options.save_every_n_steps
            keep_last = options.save_last_n_steps_state or options.save_last_n_steps
        old = superseded_number(kind, number, every=every, keep_last=keep_last)
        if old is not None and options.output_dir is not None:
            pattern = numbered_pattern(options.output_name, kind, "-state")
            remove_states(options.output_dir, pattern, up_to=old, keep=None, warn=self._reporter.warning)


# ---------------------------------------------------------------------------------------------------------- resuming


def advance(schedule: Steps, step: int) -> None:
    """Brings a schedule that is at its start to where it would be after `step` steps, whatever kind it is of."""
    for _ in range(step):
        schedule.step()


def progress_of(head: StateHead) -> Progress:
    """How far the loop had come."""
    loop, position = head.content["loop"], head.content["position"]
    done = [DUTIES.index(name) + 1 for name in position["duties_done"] if name in DUTIES]
    return Progress(
        step=int(position["step"]),
        num_duties_done=max(done, default=0),
        losses=tuple(unpack(loop["losses"], {})),
        loss_sum=float(loop["loss_sum"]),
        num_skipped_in_a_row=int(loop["num_skipped_in_a_row"]),
    )


def resume_state(head: StateHead, trained: Trainables, *, step: int) -> None:
    """Sets network, optimizer, schedule, loss scale and random generators to the state.

    `step` is where the run goes on, which the options may have moved. Raises `UserError` for a state that is damaged or
    of another run.
    """
    content = head.content
    optimizer_tensors = read_tensors(head.path, "optimizer")
    try:
        trained.network.resume_from(unpack(content["network"], read_tensors(head.path, "network")))
        saved = unpack(content["optimizer"], optimizer_tensors)
        set_optimizer(trained.optimizer, saved["state"], saved["defaults"])
        scaler = unpack(content["scaler"], optimizer_tensors)
        if scaler and trained.scaler.state_dict():
            trained.scaler.load_state_dict(scaler)
        schedule = unpack(content["schedule"], optimizer_tensors)
        trained.schedule.load_state_dict(schedule if step == head.step else {**schedule, "step": step})
        generators = unpack(content["random"], read_tensors(head.path, "random"))
        if trained.rank < len(generators):
            set_random_state(generators[trained.rank], trained.device)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise damaged(head.path, f"it does not fit this run ({error})") from error


def set_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], defaults: Mapping[str, object]) -> None:
    """Loads the optimizer's state as it was, bit for bit and type for type.

    A setting that the options have changed since, seen by `defaults`, is not set back. Learning rates are the schedule's.
    Raises `ValueError` when the groups differ.
    """
    groups = optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        raise ValueError(f"the optimizer's groups have {sizes} tensors here and others in the state")
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    optimizer.load_state_dict(dict(state))
    for number, parameter in zip(numbers, parameters, strict=True):
        kept = cast("dict[str, Any]", optimizer.state[parameter])
        for name, value in cast("Mapping[str, Any]", state["state"].get(number, {})).items():
            loaded = kept.get(name)
            # torch's loading turns numbers into the parameter's type; what was saved is put back.
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                kept[name] = value.to(loaded.device)
    for group in groups:
        for name, value in optimizer.defaults.items():
            if name != "lr" and name in defaults and defaults[name] != value:
                group[name] = value
