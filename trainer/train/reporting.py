"""What a run tells the world: events in the run folder, lines on the console, scalars for TensorBoard; and what the
world tells the run: command files and signals.

One object has all of it, so that the loop and the recipe state facts once and never ask where they go.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from trainer.schema.base import Problem
from trainer.schema.events import EventWriter
from trainer.schema.run_folder import Command, RunFolder
from trainer.schema.run_liveness import Heartbeat

if TYPE_CHECKING:
    from trainer.train.trackers import Tracker

logger = logging.getLogger("trainer")

PAUSE_POLL_SECONDS = 0.2
"""How often a paused run looks for `resume` or `stop`."""

PROGRESS_INTERVAL_SECONDS = 0.25
"""Progress events closer together than this are dropped (the last one of a phase never is)."""


class StopRequested(Exception):
    """Raised between pieces of work after a `stop` command or a signal; the run ends as `stopped`, not as failed."""


class Reporter:
    """Events, console and TensorBoard out; commands and signals in.

    `run` is None on the plain command line: then nothing is written but the console (and TensorBoard when asked for).
    A reporter that is not `main` (rank above 0) writes nothing and still answers signals.
    """

    def __init__(
        self,
        run: RunFolder | None = None,
        *,
        events: EventWriter | None = None,
        heartbeat: Heartbeat | None = None,
        is_main: bool = True,
    ) -> None:
        self._run = run
        self._events = events
        self._heartbeat = heartbeat
        self._is_main = is_main
        self._trackers: list[Tracker] = []
        self._place = (0, 1)
        self._bar: tqdm[NoReturn] | None = None
        self._phase_bar: tqdm[NoReturn] | None = None
        self._stop = threading.Event()
        self._signals = 0
        self._save_asked = False
        self._sample_asked = False
        self._phase = "check"
        self._last_progress = 0.0
        self._num_warnings = 0
        self._paused = False
        self._paused_seconds = 0.0
        self._num_steps_done = 0
        self._events_lost = False

    # ---- out -------------------------------------------------------------------------------------------------

    @property
    def run(self) -> RunFolder | None:
        return self._run

    @property
    def paused_seconds(self) -> float:
        """Time spent paused so far; step times leave it out."""
        return self._paused_seconds

    @property
    def num_steps_done(self) -> int:
        """Optimizer steps reported so far."""
        return self._num_steps_done

    def event(self, kind: str, **fields: object) -> None:
        if self._events is None or not self._is_main:
            return
        try:
            self._events.write(kind, **fields)
            self._events_lost = False
        except OSError as error:
            # A full disk must not end a training; the next event tries again.
            if not self._events_lost:
                logger.warning("events cannot be written: %s", error.strerror or error)
            self._events_lost = True

    def note(self, text: str) -> None:
        """A line that explains a decision; not a problem."""
        if self._is_main:
            logger.info(text)

    def warning(self, text: str) -> None:
        """Something the user should look at, though the run goes on."""
        self._num_warnings += 1
        if self._is_main:
            logger.warning(text)
        self.event("warning", message=text)

    def phase(self, name: str) -> None:
        self._close_phase_bar()
        self._phase = name
        self._last_progress = 0.0
        if self._heartbeat is not None:
            self._heartbeat.update(phase=name)
        if self._is_main:
            logger.info("phase: %s", name)
        self.event("phase", name=name)

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` pieces of the current phase; also raises `StopRequested` when a stop was asked for."""
        now = time.monotonic()
        if done >= total or now - self._last_progress >= PROGRESS_INTERVAL_SECONDS:
            self._last_progress = now
            self.event("progress", phase=self._phase, done=done, total=total)
            self._show_progress(done, total)
        if self._heartbeat is not None:
            self._heartbeat.update(progress=f"{self._phase} {done}/{total}")
        self.check_stop()

    def _show_progress(self, done: int, total: int) -> None:
        """The console's bar of a phase before training; during training the steps have theirs."""
        if not self._is_main or self._run is not None or self._bar is not None:
            return
        if self._phase_bar is None:
            # The position is given since a bar that someone else left open in this process would push ours a line down.
            self._phase_bar = tqdm(total=total, desc=self._phase, file=sys.stderr, position=0)
        self._phase_bar.n = done
        self._phase_bar.refresh()
        if done >= total:
            self._close_phase_bar()

    def _close_phase_bar(self) -> None:
        if self._phase_bar is not None:
            self._phase_bar.close()
            self._phase_bar = None

    def plan(self, **fields: object) -> None:
        self.event("plan", **fields)

    def start_training(self, num_steps: int, first_step: int) -> None:
        """Shows the progress bar that other interfaces know how to read (named `steps`)."""
        self._close_phase_bar()
        if self._is_main and self._run is None:
            self._bar = tqdm(
                total=num_steps, initial=first_step, desc="steps", smoothing=0, file=sys.stderr, position=0
            )

    def step(self, *, step: int, scalars: Mapping[str, float], **fields: object) -> None:
        """One optimizer step. `fields` go to the event, `scalars` to TensorBoard under the reference's names."""
        self._num_steps_done = step
        self.event("step", step=step, **fields)
        if self._heartbeat is not None:
            self._heartbeat.update(progress=f"step {step}")
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(_shown_beside(scalars))
        elif self._is_main and self._run is not None:
            logger.info("step %d  loss %.5f", step, scalars.get("loss/current", float("nan")))
        epoch = fields.get("epoch")
        self._place = (step, epoch if isinstance(epoch, int) else self._place[1])
        self._log(scalars, step)

    def _log(self, scalars: Mapping[str, float], place: int) -> None:
        step, epoch = self._place
        self._track(lambda tracker: tracker.log(scalars, place=place, step=step, epoch=epoch))

    def _track(self, work: Callable[[Tracker], None]) -> None:
        """Tells every tracker; one that fails is left out from then on."""
        for tracker in tuple(self._trackers):
            try:
                work(tracker)
            except Exception as error:  # noqa: BLE001 - disk, network and other packages: a curve is not worth a run
                self._trackers.remove(tracker)
                self.warning(f"{type(tracker).__name__} gets nothing more: {type(error).__name__}: {error}")

    def epoch(self, epoch: int, *, mean_loss: float) -> None:
        """The end of an epoch. `mean_loss` is over its steps."""
        if math.isfinite(mean_loss):
            self._log({"loss/epoch_average": mean_loss}, epoch)

    def validation(self, *, step: int, epoch: int, loss: float, train_loss: float, is_epoch_end: bool) -> None:
        """A validation loss, and how far it is from the mean loss of training (`train_loss`)."""
        if self._is_main:
            logger.info("validation loss %.5f after step %d", loss, step)
        self.event("validation", step=step, epoch=epoch, loss=loss, train_loss=train_loss, is_epoch_end=is_epoch_end)
        kind, place = ("epoch", epoch) if is_epoch_end else ("step", step)
        scalars = {f"loss/validation/{kind}_average": loss}
        if math.isfinite(train_loss):
            scalars[f"loss/validation/{kind}_divergence"] = loss - train_loss
        self._place = (step, epoch)
        self._log(scalars, place)

    def checkpoint(self, path: Path, *, step: int, epoch: int, is_final: bool) -> None:
        if self._is_main:
            logger.info("saved %s", path)
        self.event(
            "checkpoint",
            step=step,
            epoch=epoch,
            path=self._shown(path),
            bytes=path.stat().st_size,
            is_final=is_final,
        )

    def sample(self, path: Path, *, step: int, epoch: int, prompt: str, index: int, seed: int) -> None:
        if self._is_main:
            logger.info("sample %s", path)
        self.event("sample", step=step, epoch=epoch, path=self._shown(path), prompt=prompt, index=index, seed=seed)
        self._track(lambda tracker: tracker.picture(path, index=index, prompt=prompt, step=step, epoch=epoch))

    def error(self, problems: Sequence[Problem]) -> None:
        self.close_bar()
        for problem in problems:
            self.event(
                "error", message=problem.what, hint=problem.hint or "", where=problem.where or "", field=problem.field
            )

    def finished(self, outcome: str, *, steps: int) -> None:
        self.close_bar()
        if self._is_main:
            logger.info("run %s after %d steps", outcome, steps)
        self.event("run_finished", outcome=outcome, steps=steps)

    def close_bar(self) -> None:
        self._close_phase_bar()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.close_bar()
        self._track(lambda tracker: tracker.close())
        self._trackers.clear()

    def use_trackers(self, trackers: Sequence[Tracker]) -> None:
        """Sends curves there, too, from now on; they are closed with the reporter."""
        self._trackers.extend(trackers)

    def _shown(self, path: Path) -> str:
        """Relative to the run folder when inside it, so that a moved folder still finds its files."""
        if self._run is not None:
            try:
                return path.resolve().relative_to(self._run.path.resolve()).as_posix()
            except ValueError:
                pass
        return str(path.resolve())

    # ---- in --------------------------------------------------------------------------------------------------

    def install_signal_handlers(self) -> None:
        """SIGINT and SIGTERM ask for a stop; a second one exits at once."""

        def handle(signal_number: int, _frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals > 1:
                os._exit(128 + signal_number)
            logger.warning("stopping after the current piece of work; once more exits at once")
            self._stop.set()

        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)

    def poll(self) -> None:
        """Takes the waiting command files. Cheap enough to call between micro-steps. Blocks while paused."""
        self._take_commands()
        if not self._paused:
            return
        self.event("paused")
        self.note("paused; memory stays in use until the run is stopped")
        started = time.monotonic()
        while self._paused and not self._stop.is_set():
            time.sleep(PAUSE_POLL_SECONDS)
            self._take_commands()
        self._paused_seconds += time.monotonic() - started
        self._paused = False
        self.event("resumed")

    def should_stop(self) -> bool:
        """Polls and answers; the form that callbacks of other packages take."""
        self.poll()
        return self._stop.is_set()

    def check_stop(self) -> None:
        if self.should_stop():
            raise StopRequested

    def take_save_request(self) -> bool:
        asked, self._save_asked = self._save_asked, False
        return asked

    def take_sample_request(self) -> bool:
        asked, self._sample_asked = self._sample_asked, False
        return asked

    def _take_commands(self) -> None:
        if self._run is None or not self._is_main:
            return
        for command in self._run.take_commands():
            result = self._obey(command)
            self.event("command", id=command.id, name=command.name, result=result)
            self._run.finish_command(command)

    def _obey(self, command: Command) -> str:
        match command.name:
            case "stop":
                self._stop.set()
            case "save":
                self._save_asked = True
            case "sample":
                self._sample_asked = True
            case "pause":
                self._paused = True
            case "resume":
                self._paused = False
            case _:
                return "unknown"
        return "accepted"


def _shown_beside(scalars: Mapping[str, float]) -> dict[str, str]:
    """What stands beside the bar of steps, under the names that other programs look for."""
    shown = {"avr_loss": f"{scalars.get('loss/average', math.nan):.4g}"}
    if "max_norm/keys_scaled" in scalars:
        shown["Keys Scaled"] = f"{scalars['max_norm/keys_scaled']:.0f}"
        shown["Average key norm"] = f"{scalars['norm/avg_key_norm']:.4g}"
    return shown
