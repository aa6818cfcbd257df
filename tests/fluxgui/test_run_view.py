"""What a run's page says, as HTML."""

from __future__ import annotations

import math
import re
from pathlib import Path

from fluxgui import run_files_view, run_list_view, run_view
from fluxgui.loss_plot import MAX_POINTS, loss_plot
from fluxgui.run_state import Checkpoint, RunError, RunState, Sample, StepPoint
from fluxgui.runs import Contents, RunView
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_probe import RunStatus


def polylines(html: str) -> dict[str, list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="(\w+)" points="([^"]*)"', html)
    return {kind: [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())] for kind, text in found}


def test_text_from_outside_is_escaped_everywhere() -> None:
    evil = "<img src=x onerror=alert(1)>"
    state = RunState(
        device=evil,
        phase=evil,
        warnings=(evil,),
        errors=(RunError(evil, evil, evil),),
        samples=(Sample(1, f"samples/{evil}.png", evil, 0, 1),),
        checkpoints=(Checkpoint(1, 1, f"checkpoints/{evil}.safetensors", 5, True),),
    )
    for status in (RunStatus("running"), RunStatus("failed"), RunStatus("crashed", evil), RunStatus("stuck", evil)):
        page = "".join(
            (
                run_view.header(evil, status, state),
                run_view.messages(status, state, evil),
                run_view.waiting([evil], is_live=True),
                run_files_view.samples(evil, state.samples),
                run_files_view.checkpoints(evil, state.checkpoints),
                run_files_view.log(evil, evil),
            )
        )
        assert "<img src=x" not in page


def test_a_crash_shows_the_end_of_the_log() -> None:
    log = "\n".join(f"line {n}" for n in range(40))
    text = run_view.messages(RunStatus("crashed"), RunState(phase="training"), log)
    assert "line 39" in text
    assert "line 25" in text
    assert "line 24\n" not in text


def test_a_failure_says_what_where_and_what_to_do() -> None:
    state = RunState(errors=(RunError("the file is cut short", "Download it again.", "/models/ae.safetensors"),))
    text = run_view.messages(RunStatus("failed"), state, "log")
    for part in ("the file is cut short", "Download it again.", "/models/ae.safetensors"):
        assert part in text


def test_a_finished_run_shows_no_errors_of_earlier_attempts() -> None:
    assert run_view.messages(RunStatus("completed"), RunState(errors=(RunError("old", "", ""),)), "log") == ""


def test_progress_counts_steps_once_training_has_begun() -> None:
    loading = RunState(phase="latents", phase_done=3, phase_total=12, num_steps=100)
    assert 'aria-valuenow="25"' in run_view.header("x", RunStatus("running"), loading)
    training = RunState(phase="training", num_steps=100, step=40)
    assert 'aria-valuenow="40"' in run_view.header("x", RunStatus("running"), training)


def test_what_resume_does_and_what_a_deletion_takes_is_said_beforehand() -> None:
    assert "goes on in this run after step 40" in run_view.waiting([], is_live=False, can_resume=True, state_step=40)
    assert "begins anew in this run" in run_view.waiting([], is_live=False, can_resume=True)
    assert "Resume" not in run_view.waiting([], is_live=False)
    words = run_view.deletion("cat", Contents(1, 12, True, 3_400_000), "/home/me/bin")
    assert "1 saved LoRA, 12 samples, its log and its settings and the state to resume from (3.4 MB)" in words
    assert "/home/me/bin" in words


def test_samples_stand_newest_first_in_the_order_of_prompts() -> None:
    shown = [Sample(step, f"samples/{step}-{i}.png", f"p{i}", i, 1) for step in (0, 10) for i in (1, 0)]
    html = run_files_view.samples("run", shown)
    assert re.findall(r'src="files/run/thumbs/([^"]+)"', html) == ["10-0.png", "10-1.png", "0-0.png", "0-1.png"]
    assert "before training" in html


def view(name: str, run_id: str, state: RunState, notes: str = "", status: str = "running") -> RunView:
    return RunView(RunFolder(Path(run_id)), name, RunStatus(status), state, notes)  # pyright: ignore[reportArgumentType]


def test_runs_of_the_same_name_differ_in_the_list_by_the_time_of_their_start() -> None:
    state = RunState(num_steps=100, step=40)
    for run_id, moment in (
        ("20260114-203112-demo", "14 Jan 20:31"),
        ("20261231-000059-demo-2", "31 Dec 00:00"),
        ("my-own-folder", ""),
        ("20269999-999999-demo", ""),
    ):
        card = run_list_view.cards([view("demo", run_id, state)], None)
        assert f'<span class="card-facts">{moment}</span>' in card
        assert "running 40 %" in card


def test_runs_are_found_by_the_words_of_their_name_status_and_notes() -> None:
    views = [view("My cat", "a", RunState(), "too <b>dark</b>"), view("My dog", "b", RunState(), status="crashed")]
    for search, found in (("cat", ["a"]), ("my", ["a", "b"]), ("CRASHED my", ["b"]), ("dark cat", ["a"]), ("fox", [])):
        assert re.findall(r'data-run="(.)"', run_list_view.cards(views, "a", search=search)) == found
    assert "<b>dark" not in run_list_view.cards(views, None)
    assert "No run has these words" in run_list_view.cards(views, None, search="fox")
    assert run_list_view.cards([], None) == ""


def test_the_queue_names_what_is_at_work_and_its_ends_move_no_further() -> None:
    waiting = [view(f"<i>{name}", name, RunState(), status="queued") for name in "abc"]
    html = run_list_view.queue(waiting, [view("now", "n", RunState())])
    assert "At work: now." in html
    assert "<i>" not in html
    unusable = re.findall(r'data-action="(\w+)" data-run="(.)"[^>]* disabled', html)
    assert unusable == [("up", "a"), ("down", "c")]
    assert run_list_view.queue([], []) == ""


def test_the_log_is_shown_from_its_end_and_can_be_only_its_problems() -> None:
    lines = [f"2026-01-01 10:00:00 INFO    step {n}" for n in range(3000)]
    lines[5] = "2026-01-01 10:00:00 WARNING caption <b>empty</b>"
    lines[6:6] = ["Traceback (most recent call last):", "  File x", "ValueError: no"]
    log = "\n".join(lines)
    assert len(run_files_view.log("run", log)) < run_files_view.LOG_SHOWN + 500
    assert "step 2999" in run_files_view.log("run", log)
    problems = run_files_view.log("run", log, only_problems=True)
    for text in ("caption &lt;b&gt;empty", "Traceback", "ValueError: no"):
        assert text in problems
    assert "step" not in problems
    assert "No warnings and no errors" in run_files_view.log(
        "run", "2026-01-01 10:00:00 INFO    step 1", only_problems=True
    )


def test_durations_read_like_words() -> None:
    assert [run_view.duration(s) for s in (4.4, 75, 3700)] == ["4 s", "1 min 15 s", "1 h 01 min"]


def test_the_plot_draws_raw_and_smoothed_losses_by_step() -> None:
    points = tuple(StepPoint(n, 2.0 if n % 2 else 1.0) for n in range(1, 11))
    lines = polylines(loss_plot(points, smoothing=0.5, num_steps=20))
    assert [x for x, _ in lines["raw"]] == [50.0 * n for n in range(1, 11)]
    assert {y for _, y in lines["raw"]} == {0.0, 300.0}
    assert lines["smooth"][0][1] == 0.0
    assert all(0 < y < 300 for _, y in lines["smooth"][1:])


def test_without_smoothing_both_lines_are_one() -> None:
    lines = polylines(loss_plot(tuple(StepPoint(n, 1 / n) for n in range(1, 9)), smoothing=0.0, num_steps=8))
    assert lines["raw"] == lines["smooth"]


def test_the_plot_of_a_long_run_stays_small_and_ignores_outliers() -> None:
    points = tuple(StepPoint(n, 1e6 if n == 500 else 0.5 + 0.1 * math.sin(n / 9)) for n in range(1, 20_001))
    html = loss_plot(points, smoothing=0.9, num_steps=20_000)
    lines = polylines(html)
    assert len(lines["raw"]) == MAX_POINTS
    assert len(html) < 30_000


def test_the_raw_line_of_a_long_run_shows_how_far_the_losses_scatter() -> None:
    points = tuple(StepPoint(n, 0.3 + 0.5 * (n * 7919 % 1000) / 999) for n in range(1, 50_001))
    lines = polylines(loss_plot(points, smoothing=0.9, num_steps=50_000))
    spread = {kind: max(y for _, y in line) - min(y for _, y in line) for kind, line in lines.items()}
    assert spread["raw"] > 240, "nearly the whole height, as single steps scatter"
    assert spread["smooth"] < spread["raw"] / 4
    assert [x for x, _ in lines["raw"]] == sorted(x for x, _ in lines["raw"])


def test_the_plot_waits_for_two_steps_and_bears_equal_losses() -> None:
    assert "appears here" in loss_plot((StepPoint(1, 0.5),), smoothing=0.9, num_steps=9)
    assert "polyline" in loss_plot((StepPoint(1, 0.5), StepPoint(2, 0.5)), smoothing=0.9, num_steps=9)


def test_the_plot_draws_the_loss_on_held_back_pictures_as_it_is() -> None:
    points = tuple(StepPoint(n, 1.0 + n % 2) for n in range(1, 21))
    html = loss_plot(points, smoothing=0.0, num_steps=20, validation=(StepPoint(10, 2.0), StepPoint(20, 1.0)))
    assert polylines(html)["validation"] == [(500.0, 0.0), (1000.0, 300.0)]
    assert "on held back pictures from 2 to 1" in html
    assert "held back pictures</span>" in html
    assert "held back" not in loss_plot(points, smoothing=0.0, num_steps=20)
