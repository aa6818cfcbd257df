"""The step loop on a small real model: arithmetic of epochs and steps, accumulation, what falls due when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.schema.base import UserError
from trainer.schema.events import EventReader, EventWriter
from trainer.schema.run_folder import RunFolder
from trainer.train.gradient_sync import GradientSync, Wishes
from trainer.train.learning_rate import LearningRateSchedule
from trainer.train.level_losses import LevelLosses
from trainer.train.loop import MAX_SKIPPED_STEPS, TrainingLoop
from trainer.train.mean_loss import MeanLoss
from trainer.train.micro_batch import NumbersLost
from trainer.train.progress import DUTIES, Progress
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.step_position import LoopSettings, StepPosition, step_generator


def settings(**changes: object) -> LoopSettings:
    values: dict[str, object] = {
        "num_steps": 6,
        "num_epochs": 2,
        "micro_steps_per_epoch": 3,
        "num_micro_steps": 1,
        "max_grad_norm": 0.0,
        "seed": 7,
        "save_every_n_steps": None,
        "save_every_n_epochs": None,
        "sample_every_n_steps": None,
        "sample_every_n_epochs": None,
        "sample_at_first": False,
        **changes,
    }
    return LoopSettings(**values)  # pyright: ignore[reportArgumentType]


class Course:
    """A loop around one weight w whose loss is (w - target)^2, with everything that fell due written down."""

    def __init__(
        self,
        loop_settings: LoopSettings,
        reporter: Reporter | None = None,
        *,
        rate: float = 0.1,
        sync: GradientSync | None = None,
        validate: Callable[[], float] | None = None,
        start: Progress | None = None,
    ) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.saved: list[tuple[StepPosition, str]] = []
        self.sampled: list[tuple[StepPosition, bool]] = []
        self.targets: list[float] = []
        self.num_micro = loop_settings.micro_steps_per_epoch
        optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)
        self.loop = TrainingLoop(
            loop_settings,
            network=self.model,
            optimizer=optimizer,
            schedule=LearningRateSchedule(optimizer, "constant", num_steps=loop_settings.num_steps),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            sync=sync or GradientSync(lambda tensor: tensor, 1),
            reporter=reporter or Reporter(is_main=False),
            rank=0,
            micro_batches=self.micro_batches,
            save=lambda position, kind: self.saved.append((position, kind)),
            sample=lambda position, is_epoch_end: self.sampled.append((position, is_epoch_end)),
            peak_bytes=lambda: 0,
            validate=validate,
            start=start,
        )

    def micro_batches(self, epoch: int, skipped: int) -> Iterator[Callable[[torch.Generator], Tensor]]:
        for number in range(skipped, self.num_micro):
            target = float(10 * epoch + number)

            def loss(_generator: torch.Generator, target: float = target) -> Tensor:
                self.targets.append(target)
                return (self.model.weight - target).square().sum()

            yield loss

    @property
    def weight(self) -> float:
        return float(self.model.weight.item())


def test_a_step_reports_its_loss_by_noise_level() -> None:
    levels = LevelLosses()
    levels.note(torch.tensor([0.0, 0.24, 0.5]), torch.tensor([1.0, 3.0, 8.0]))
    levels.note(torch.tensor([1.0]), torch.tensor([math.nan]))
    assert levels.read(torch.tensor(5.0)) == (5.0, [2.0, None, 8.0, None])
    assert levels.read(torch.tensor(6.0)) == (6.0, None)
    levels.note(torch.tensor([0.3]), torch.tensor([1.0]))
    levels.clear()
    assert levels.read(torch.tensor(7.0)) == (7.0, None)


def test_every_micro_batch_of_every_epoch_is_trained_on_in_order() -> None:
    course = Course(settings())
    position, stopped = course.loop.run()
    assert (position, stopped) == (StepPosition(6, 2), False)
    assert course.targets == [10, 11, 12, 20, 21, 22]
    expected = 0.0
    for target in course.targets:
        expected -= 0.1 * 2 * (expected - target)
    assert course.weight == pytest.approx(expected, rel=1e-6)


def test_accumulation_means_over_the_group_and_a_rest_makes_a_smaller_one() -> None:
    course = Course(settings(num_micro_steps=2, num_steps=4))
    position, _ = course.loop.run()
    assert position.step == 4
    expected = 0.0
    for group in ([10, 11], [12], [20, 21], [22]):
        expected -= 0.1 * sum(2 * (expected - target) for target in group) / len(group)
    assert course.weight == pytest.approx(expected, rel=1e-6)


def test_training_ends_inside_an_epoch_when_the_steps_are_done() -> None:
    course = Course(settings(num_steps=4))
    position, _ = course.loop.run()
    assert position == StepPosition(4, 2)
    assert len(course.targets) == 4


def test_the_gradient_is_clipped_to_the_norm() -> None:
    course = Course(settings(num_steps=1, max_grad_norm=1.0))
    course.loop.run()
    assert course.weight == pytest.approx(0.1)


def test_saves_and_samples_fall_due_as_asked() -> None:
    course = Course(settings(save_every_n_steps=2, save_every_n_epochs=1, sample_every_n_steps=4, sample_at_first=True))
    course.loop.run()
    steps = [(position.step, kind) for position, kind in course.saved]
    assert steps == [(2, "step"), (3, "epoch"), (4, "step"), (6, "step")], "no epoch file for the last epoch"
    assert [(position.step, is_end) for position, is_end in course.sampled] == [(0, False), (4, False)]


def test_a_resumed_loop_first_does_what_was_left_to_do_after_its_last_step() -> None:
    due = settings(save_every_n_steps=3, save_every_n_epochs=1, sample_every_n_steps=3)
    for num_done, saved, sampled in (
        (0, [(3, "step"), (3, "epoch")], [3]),
        (DUTIES.index("step sample"), [(3, "epoch")], [3]),
        (DUTIES.index("epoch save"), [(3, "epoch")], []),
        (len(DUTIES), [], []),
    ):
        course = Course(due, start=Progress(step=3, num_duties_done=num_done))
        course.loop.run()
        assert course.targets == [20, 21, 22], "the second epoch alone"
        assert [(position.step, kind) for position, kind in course.saved] == [*saved, (6, "step")]
        assert [position.step for position, _ in course.sampled] == [*sampled, 6]


def test_a_loop_resumed_inside_an_epoch_skips_its_first_batches_and_keeps_the_mean() -> None:
    whole = Course(settings(num_micro_steps=2, num_steps=4))
    whole.loop.run()
    part = Course(settings(num_micro_steps=2, num_steps=3))
    part.loop.run()
    rest = Course(settings(num_micro_steps=2, num_steps=4), start=part.loop.progress)
    with torch.no_grad():
        rest.model.weight.copy_(part.model.weight)
    rest.loop.run()
    assert rest.targets == [22]
    assert rest.weight == whole.weight
    assert rest.loop.progress == whole.loop.progress


def test_states_are_saved_with_each_lora_and_when_one_is_due() -> None:
    due = iter([False, True, False, False, True, False])
    states: list[tuple[int, int, str]] = []
    course = Course(settings(save_every_n_steps=5, save_every_n_epochs=1))
    course.loop._duties._save_state = lambda progress, kind: states.append(  # pyright: ignore[reportPrivateUsage]
        (progress.step, progress.num_duties_done, kind)
    )
    course.loop._state_is_due = lambda: next(due)  # pyright: ignore[reportPrivateUsage]
    course.loop.run()
    assert states == [(2, 1, "moment"), (3, DUTIES.index("epoch save") + 1, "epoch"), (5, 1, "step")]


def test_epochs_win_over_steps_for_samples() -> None:
    course = Course(settings(sample_every_n_steps=1, sample_every_n_epochs=2))
    course.loop.run()
    assert course.sampled == [(StepPosition(6, 2), True)]


def test_a_loss_that_is_no_number_ends_the_run_with_advice() -> None:
    course = Course(settings(num_steps=6), rate=math.inf)
    with pytest.raises(UserError, match="the loss became") as error:
        course.loop.run()
    assert "learning_rate" in str(error.value)


def test_no_lost_number_gets_into_the_weights() -> None:
    course = Course(settings(num_steps=6))
    good = course.micro_batches

    def with_a_bad_one(epoch: int, skipped: int) -> Iterator[Callable[[torch.Generator], Tensor]]:
        for number, loss in enumerate(good(epoch, skipped)):
            yield (lambda _generator: (course.model.weight * math.nan).sum()) if number == 1 else loss

    course.loop._micro_batches = with_a_bad_one  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(NumbersLost, match="the loss became nan at step 2") as error:
        course.loop.run()
    assert error.value.position == StepPosition(1, 1)
    assert course.weight == pytest.approx(0.1 * 2 * 10)
    assert error.value.micro_batch(error.value.generator).isnan()


def test_a_gradient_that_is_no_number_ends_the_run_too() -> None:
    course = Course(settings(num_steps=1))
    course.loop._micro_batches = lambda _epoch, _skipped: iter(  # pyright: ignore[reportPrivateUsage]
        [lambda _generator: course.model.weight.abs().sqrt().sum()]
    )
    with pytest.raises(NumbersLost, match=r"the gradient's norm became (inf|nan) at step 1"):
        course.loop.run()
    assert course.weight == 0.0


def test_a_gradient_beyond_fp16_halves_the_loss_scale_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    course = Course(settings(num_steps=6), Reporter(), rate=0.01)
    course.loop._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)  # pyright: ignore[reportPrivateUsage]

    def in_half(_epoch: int, _skipped: int) -> Iterator[Callable[[torch.Generator], Tensor]]:
        for _ in range(3):
            # The gradient of 20 leaves the range at scales above 2048.
            yield lambda _generator: (course.model.weight.half() * 20.0).float().sum()

    course.loop._micro_batches = in_half  # pyright: ignore[reportPrivateUsage]
    with caplog.at_level("INFO", logger="trainer"):
        course.loop.run()
    lines = [record.message for record in caplog.records if "changed nothing" in record.message]
    assert [line.split(" changed")[0] for line in lines] == ["step 1", "step 2", "step 3"]
    assert "at loss scale 16384; from now on it is 8192" in lines[0]
    assert course.weight == pytest.approx(-3 * 0.01 * 20, rel=1e-3)


def test_gradients_that_never_fit_fp16_end_the_run() -> None:
    course = Course(settings(num_steps=60, num_epochs=20))
    course.loop._scaler = torch.amp.GradScaler("cpu")  # pyright: ignore[reportPrivateUsage]
    course.loop._micro_batches = lambda _epoch, _skipped: iter(  # pyright: ignore[reportPrivateUsage]
        [lambda _generator: course.model.weight.abs().sqrt().sum()] * 3
    )
    with pytest.raises(NumbersLost, match=f"at step {MAX_SKIPPED_STEPS + 1}"):
        course.loop.run()


def test_a_stop_during_a_sample_on_the_main_process_is_told_to_the_others_at_the_next_step() -> None:
    def of_both(tensor: Tensor) -> Tensor:
        flags.append(float(tensor[0]))
        return tensor

    flags: list[float] = []
    reporter = Reporter(is_main=False)
    course = Course(settings(sample_every_n_steps=2), reporter, sync=GradientSync(of_both, 2))

    def stop(_position: StepPosition, _is_epoch_end: bool) -> None:
        reporter._stop.set()  # pyright: ignore[reportPrivateUsage]
        raise StopRequested

    course.loop._duties._sample = stop  # pyright: ignore[reportPrivateUsage]
    assert course.loop.run() == (StepPosition(3, 1), True)
    assert flags == [0.0, 0.0, 1.0]


def test_a_stop_between_two_steps_ends_after_the_last_whole_step(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x", config_toml="", dataset_toml="", sample_prompts="", info={})
    reporter = Reporter(run, events=EventWriter(run.events_jsonl, 1))
    course = Course(settings(), reporter)
    run.send_command("stop")
    assert course.loop.run() == (StepPosition(0, 1), True)
    assert [e["result"] for e in EventReader(run.events_jsonl).read_new() if e["kind"] == "command"] == ["accepted"]


def test_a_stop_during_a_sample_keeps_the_position() -> None:
    course = Course(settings(sample_every_n_steps=2))

    def stop(_position: StepPosition, _is_epoch_end: bool) -> None:
        raise StopRequested

    course.loop._duties._sample = stop  # pyright: ignore[reportPrivateUsage]
    assert course.loop.run() == (StepPosition(2, 1), True)


def test_save_now_is_obeyed_after_the_step(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x", config_toml="", dataset_toml="", sample_prompts="", info={})
    course = Course(settings(), Reporter(run, events=EventWriter(run.events_jsonl, 1)))
    run.send_command("save")
    course.loop.run()
    assert course.saved == [(StepPosition(1, 1), "step")]


def test_a_save_or_sample_that_the_disk_refuses_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x", config_toml="", dataset_toml="", sample_prompts="", info={})
    course = Course(
        settings(save_every_n_epochs=1, sample_every_n_steps=4), Reporter(run, events=EventWriter(run.events_jsonl, 1))
    )

    def refuse(position: StepPosition, _detail: object) -> None:
        raise UserError(f"the disk is full at step {position.step}")

    course.loop._duties._save = course.loop._duties._sample = refuse  # pyright: ignore[reportPrivateUsage]
    assert course.loop.run() == (StepPosition(6, 2), False)
    events = EventReader(run.events_jsonl).read_new()
    warnings = [str(event["message"]) for event in events if event["kind"] == "warning"]
    assert [warning.partition(":")[0] for warning in warnings] == ["nothing was saved", "no sample was made"]
    assert "the disk is full at step 3" in warnings[0]
    assert "the disk is full at step 4" in warnings[1]


def test_events_of_steps_hold_what_the_page_shows(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x", config_toml="", dataset_toml="", sample_prompts="", info={})
    Course(settings(), Reporter(run, events=EventWriter(run.events_jsonl, 1))).loop.run()
    steps = [event for event in EventReader(run.events_jsonl).read_new() if event["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["loss"] == pytest.approx(100.0)
    assert steps[0]["grad_norm"] == pytest.approx(20.0)
    assert steps[0]["lr"] == pytest.approx(0.1)
    assert steps[1]["loss_average"] == pytest.approx((100.0 + (2.0 - 11) ** 2) / 2)


def test_events_that_the_disk_refuses_do_not_end_the_training(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x", config_toml="", dataset_toml="", sample_prompts="", info={})
    reporter = Reporter(run, events=EventWriter(run.events_jsonl, 1))
    run.events_jsonl.mkdir()
    assert Course(settings(), reporter).loop.run() == (StepPosition(6, 2), False)


def test_the_average_covers_one_epoch() -> None:
    average = MeanLoss(2)
    assert [average.add(value) for value in (1.0, 3.0, 5.0)] == [1.0, 2.0, 4.0]


def test_noise_depends_on_position_rank_and_seed_alone() -> None:
    def draw(*position: int) -> list[float]:
        return torch.rand(3, generator=step_generator(*position)).tolist()

    assert draw(1, 2, 3, 0) == draw(1, 2, 3, 0)
    others = [draw(2, 2, 3, 0), draw(1, 3, 3, 0), draw(1, 2, 4, 0), draw(1, 2, 3, 1)]
    assert all(other != draw(1, 2, 3, 0) for other in others)


def test_gradients_of_all_processes_are_averaged_in_one_reduction() -> None:
    calls: list[Tensor] = []

    def mean_with_another(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return (tensor + 3) / 2

    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 1))]
    parameters[0].grad = torch.ones(2)
    wishes = GradientSync(mean_with_another, 2)(parameters, Wishes(save=True))
    assert wishes == Wishes(stop=True, save=True, sample=True, state=True), "what one process wishes, all do"
    assert GradientSync(lambda tensor: tensor, 2)(parameters, Wishes(sample=True)) == Wishes(sample=True)
    assert len(calls) == 1
    assert parameters[0].grad.tolist() == [2.0, 2.0]
    assert parameters[1].grad is not None
    assert parameters[1].grad.tolist() == [[1.5], [1.5], [1.5]]


def test_validation_falls_due_by_steps_and_epochs_and_is_taken_once_a_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    reporter = Reporter(run, events=EventWriter(run.events_jsonl, 1))
    written: list[tuple[str, float, int]] = []

    class Curves:
        def log(self, scalars: Mapping[str, float], *, place: int, step: int, epoch: int) -> None:
            written.extend((tag, value, place) for tag, value in scalars.items())

        def picture(self, path: Path, *, index: int, prompt: str, step: int, epoch: int) -> None: ...

        def close(self) -> None: ...

    reporter.use_trackers([Curves()])
    losses = iter((0.5, 0.25, 0.125, 0.1))
    course = Course(settings(validate_every_n_steps=2), reporter, validate=lambda: next(losses))
    course.loop.run()
    found = [e for e in EventReader(run.events_jsonl).read_new() if e["kind"] == "validation"]
    # Three steps an epoch: the sixth step is taken once and ends an epoch as well.
    assert [(e["step"], e["loss"], e["is_epoch_end"]) for e in found] == [
        (2, 0.5, False),
        (3, 0.25, True),
        (4, 0.125, False),
        (6, 0.1, False),
        (6, 0.1, True),
    ]
    validation = [(tag, place) for tag, _, place in written if "validation" in tag and tag.endswith("average")]
    assert validation == [
        ("loss/validation/step_average", 2),
        ("loss/validation/epoch_average", 1),
        ("loss/validation/step_average", 4),
        ("loss/validation/step_average", 6),
        ("loss/validation/epoch_average", 2),
    ]
    by_tag = {(tag, place): value for tag, value, place in written}
    mean = by_tag["loss/epoch_average", 2]
    assert by_tag["loss/validation/epoch_divergence", 2] == pytest.approx(0.1 - mean)


def test_the_plateau_sees_the_mean_loss_of_each_epoch_when_nothing_is_validated() -> None:
    course = Course(settings(num_epochs=3, num_steps=9), rate=1e-9)
    optimizer = course.loop._optimizer  # pyright: ignore[reportPrivateUsage]
    # The targets grow from epoch to epoch and the weight stays: the loss rises.
    course.loop._schedule = course.loop._duties._schedule = LearningRateSchedule(  # pyright: ignore[reportPrivateUsage]
        optimizer, "reduce_lr_on_plateau", num_steps=9, arguments={"patience": 0, "factor": 0.5, "eps": 0.0}
    )
    course.loop.run()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-9)
