"""Folding events into the state that the page shows."""

from __future__ import annotations

import pytest

from fluxgui.run_state import RunState, StepPoint, fold, smoothed, thinned

Event = dict[str, object]


def step(number: int, loss: float | None, *, time: float = 0.0, attempt: int = 1) -> Event:
    return {"kind": "step", "step": number, "epoch": 1, "loss": loss, "lr": 1e-4, "time": time, "attempt": attempt}


def plan(num_steps: int, first_step: int = 0) -> Event:
    return {"kind": "plan", "num_images": 12, "num_epochs": 2, "num_steps": num_steps, "first_step": first_step}


def test_a_whole_run_folds_to_its_last_figures() -> None:
    state = fold(
        RunState(),
        [
            {"kind": "run_started", "pid": 7, "device": "", "attempt": 1, "time": 1.0},
            plan(3),
            {"kind": "phase", "name": "latents"},
            {"kind": "progress", "phase": "latents", "done": 4, "total": 12},
            {"kind": "phase", "name": "training"},
            step(1, 0.5),
            step(2, 0.25),
            {"kind": "sample", "step": 2, "path": "samples/a.png", "prompt": "a cat", "index": 0, "seed": 3},
            step(3, 0.125),
            {
                "kind": "checkpoint",
                "step": 3,
                "epoch": 1,
                "path": "checkpoints/a.safetensors",
                "bytes": 9,
                "is_final": True,
            },
            {"kind": "run_finished", "outcome": "completed", "steps": 3},
        ],
    )
    assert (state.num_seen, state.num_steps, state.step, state.loss) == (11, 3, 3, 0.125)
    assert state.points == (StepPoint(1, 0.5), StepPoint(2, 0.25), StepPoint(3, 0.125))
    assert (state.samples[0].prompt, state.samples[0].seed) == ("a cat", 3)
    assert (state.checkpoints[0].num_bytes, state.checkpoints[0].is_final) == (9, True)
    assert (state.phase, state.outcome) == ("training", "completed")


def test_folding_in_two_parts_gives_the_same_as_in_one() -> None:
    events: list[Event] = [plan(9), *(step(n, 1 / n, time=float(n)) for n in range(1, 8)), {"kind": "paused"}]
    for cut in range(len(events)):
        assert fold(fold(RunState(), events[:cut]), events[cut:]) == fold(RunState(), events)


def test_unknown_kinds_and_odd_values_change_nothing_but_the_count() -> None:
    state = fold(RunState(), [{"kind": "weather", "loss": 3}, {"kind": "step", "step": "x", "loss": None}, {}])
    assert (state.num_seen, state.step, state.points, state.loss) == (3, 0, (), None)


def test_a_loss_that_is_not_a_number_is_not_drawn() -> None:
    assert fold(RunState(), [step(1, float("nan")), step(2, None), step(3, 0.5)]).points == (StepPoint(3, 0.5),)


def test_a_second_attempt_draws_each_step_once() -> None:
    first = [plan(10), *(step(n, float(n)) for n in range(1, 6))]
    state = fold(RunState(), [*first, {"kind": "run_started", "attempt": 2}, plan(10, first_step=3), step(4, 40.0)])
    assert [(p.step, p.value) for p in state.points] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_sample_that_a_resumed_run_draws_once_more_is_shown_once() -> None:
    def sample(step: int, index: int, path: str) -> Event:
        return {"kind": "sample", "step": step, "path": path, "prompt": "a cat", "index": index, "seed": 3}

    first = [sample(2, 0, "samples/a.png"), sample(2, 1, "samples/b.png")]
    state = fold(RunState(), [*first, sample(4, 0, "samples/c.png"), sample(2, 1, "samples/d.png")])
    assert [entry.path for entry in state.samples] == ["samples/a.png", "samples/c.png", "samples/d.png"]


def test_the_time_left_follows_the_pace_of_the_steps() -> None:
    state = fold(RunState(), [plan(10), step(1, 1.0, time=100.0), step(2, 1.0, time=102.0), step(3, 1.0, time=104.0)])
    assert state.seconds_left == pytest.approx(14.0)


def test_a_pause_does_not_count_into_the_pace() -> None:
    events = [plan(10), step(1, 1.0, time=0.0), {"kind": "paused"}, {"kind": "resumed"}]
    state = fold(RunState(), [*events, step(2, 1.0, time=1000.0), step(3, 1.0, time=1001.0)])
    assert state.seconds_left == pytest.approx(7.0)
    assert not state.is_paused


def test_smoothing_starts_at_the_first_value_and_follows() -> None:
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])
    assert smoothed([3.0, 1.0], 0.0) == [3.0, 1.0]


def test_thinning_keeps_the_mean_and_the_last_step() -> None:
    points = tuple(StepPoint(n, float(n)) for n in range(1, 101))
    thin = thinned(points, 10)
    assert [p.step for p in thin] == list(range(10, 101, 10))
    assert thin[0].value == pytest.approx(5.5)
    assert thinned(points, 100) == list(points)


def test_validation_losses_are_kept_once_a_step_and_cut_where_a_later_attempt_begins() -> None:
    events: list[Event] = [
        plan(30),
        {"kind": "validation", "step": 10, "epoch": 1, "loss": 0.5, "is_epoch_end": False},
        {"kind": "validation", "step": 10, "epoch": 1, "loss": 0.5, "is_epoch_end": True},
        {"kind": "validation", "step": 20, "epoch": 2, "loss": 0.25, "is_epoch_end": True},
        {"kind": "validation", "step": 25, "epoch": 3, "loss": None, "is_epoch_end": True},
    ]
    state = fold(RunState(), events)
    assert state.validation == (StepPoint(10, 0.5), StepPoint(20, 0.25))
    assert fold(state, [plan(30, first_step=12)]).validation == (StepPoint(10, 0.5),)
