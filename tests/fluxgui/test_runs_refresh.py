"""What a look of the live page costs, and what the page notices, measures and hands out."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from fluxgui import run_notices
from fluxgui.loss_plot import draw_chart
from fluxgui.run_compare import differences
from fluxgui.run_export import report, zip_stream
from fluxgui.run_state import NUM_LEVELS, RunState, Sample, StepPoint
from fluxgui.runs import RunWatcher, read_notes, write_notes
from fluxgui.runs_actions import form_values
from fluxgui.runs_layout import build_runs_layout
from fluxgui.runs_tab import AWAY_SECONDS, RunsTab
from fluxgui.system_line import Load, LoadSampler, read_load, system_line
from tests.fluxgui.ended_run import make_ended_run
from trainer.schema.run_folder import RunFolder
from trainer.schema.run_liveness import Heartbeat, WorkerLock

MAX_BYTES = 50_000
MAX_SECONDS = 0.1


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path))
    return tmp_path


def build_tab() -> RunsTab:
    with gr.Blocks():
        return build_runs_layout(RunWatcher(), LoadSampler()).tab


def sent(values: dict[str, Any]) -> dict[str, Any]:
    """What of a look goes to the browser."""
    return {
        name: value
        for name, value in values.items()
        if name != "shown" and not (isinstance(value, dict) and value == gr.skip())
    }


def look(tab: RunsTab, run: RunFolder, shown: dict[str, str], *settings: Any) -> dict[str, Any]:
    return dict(zip(tab.parts, tab.look(run.path.name, shown, *settings), strict=True))


@pytest.mark.parametrize("chart", ["loss", "levels", "rate"])
def test_a_refresh_at_ten_thousand_steps_is_small_and_fast(home: Path, chart: str) -> None:
    run = make_ended_run(home / "runs", "long", num_steps=10_000, outcome=None)
    with WorkerLock(run), Heartbeat(run) as heartbeat:
        heartbeat.update(phase="training")
        tab = build_tab()
        settings = (0.9, "", chart, None, "all", ())
        shown = look(tab, run, {}, *settings)["shown"]
        seconds: list[float] = []
        for step in range(10_001, 10_006):
            with run.events_jsonl.open("a", encoding="utf-8") as events:
                event = {
                    "kind": "step",
                    "step": step,
                    "epoch": 1,
                    "loss": 0.3 + step / 1e6,
                    "lr": 1e-4,
                    "grad_norm": 0.5,
                }
                events.write(json.dumps({**event, "level_losses": [0.3, None, None, 0.5], "time": 2e4}) + "\n")
            with run.worker_log.open("a", encoding="utf-8") as log:
                log.write(f"2026-01-01 10:00:01 INFO    step {step}  loss 0.3\n")
            started = time.process_time()
            looked = look(tab, run, shown, *settings)
            seconds.append(time.process_time() - started)
            shown = looked["shown"]
            changed = sent(looked)
            assert {"header", "plot", "log"} <= set(changed)
            assert not {"samples", "checkpoints", "config", "notes", "messages"} & set(changed)
            assert len(json.dumps(changed).encode()) < MAX_BYTES
            drawn = sum(len(points.split()) for points in re.findall(r'points="([^"]*)"', changed["plot"]))
            assert 100 < drawn <= 2000
        assert min(seconds) < MAX_SECONDS


def test_nothing_new_sends_nothing_and_who_is_away_is_asked_rarely(home: Path) -> None:
    run = make_ended_run(home / "runs", "cat")
    tab = build_tab()
    shown = look(tab, run, {}, 0.9, None, "loss", None, "all", None, None)["shown"]
    assert sent(look(tab, run, shown)) == {}
    away = look(tab, run, shown, 0.9, "", "loss", None, "all", (), "away")
    assert away["timer"]["value"] == AWAY_SECONDS


def state_of(losses: list[float], *, norm: float = 1.0, rate: float = 1e-4) -> RunState:
    points = tuple(StepPoint(step, loss) for step, loss in enumerate(losses, 1))
    norms = tuple(StepPoint(point.step, norm) for point in points)
    return RunState(points=points, norms=norms, rates=tuple(StepPoint(point.step, rate) for point in points))


def test_a_training_that_teaches_nothing_is_noticed(tmp_path: Path) -> None:
    noisy = [0.5 + 0.2 * (n * 7919 % 100) / 100 for n in range(800)]
    for state, words in (
        (state_of(noisy), ""),
        (state_of([loss - n / 4000 for n, loss in enumerate(noisy)]), ""),
        (state_of(noisy[:10], norm=0), ""),
        (state_of(noisy, norm=0), "gradients were zero"),
        (state_of(noisy, rate=0), "learning rate was zero"),
        (state_of([0.25] * 60), "does not move: it was 0.25"),
        (state_of([loss + n / 4000 for n, loss in enumerate(noisy)]), "The loss rises"),
    ):
        told = run_notices.notices(state, tmp_path)
        assert len(told) == bool(words)
        assert words in "".join(told)


def test_black_samples_of_the_newest_step_are_noticed(tmp_path: Path) -> None:
    for name, colour in (("old", 0), ("new", 3), ("good", 90)):
        Image.new("RGB", (16, 16), (colour, colour, colour)).save(tmp_path / f"{name}.png")
    old, black, good = (
        Sample(step, f"{name}.png", "a cat", 0, 1) for step, name in ((1, "old"), (2, "new"), (3, "good"))
    )
    assert "black (1)" in run_notices.notices(RunState(samples=(old, black)), tmp_path)[0]
    assert run_notices.notices(RunState(samples=(old, black, good)), tmp_path) == []
    assert run_notices.notices(RunState(samples=(Sample(4, "gone.png", "a cat", 0, 1),)), tmp_path) == []


def test_charts_show_levels_rate_and_the_steps_that_were_asked_for() -> None:
    points = tuple(StepPoint(n, 1.0 + n % 3) for n in range(1, 101))
    state = RunState(num_steps=100, step=100, points=points, rates=points, levels=(points, (), points[:9], points))
    assert NUM_LEVELS == 4
    levels = draw_chart(state, "levels", smoothing=0.5)
    assert re.findall(r'polyline class="([^"]+)"', levels) == ["hue-0", "hue-2", "hue-3"]
    assert "0 to 25 % noise" in levels
    part = draw_chart(state, "rate", smoothing=0.5, window=(20, 40))
    assert 'data-first="20" data-last="40"' in part
    (line,) = re.findall(r'points="([^"]*)"', part)
    assert (len(line.split()), line.split()[0].split(",")[0], line.split()[-1].split(",")[0]) == (21, "0.0", "1000.0")
    assert "did not record" in draw_chart(RunState(points=points), "levels", smoothing=0.5)
    assert 'data-action="whole"' in draw_chart(state, "loss", smoothing=0.5, window=(200, 300))


def test_a_machine_is_measured_and_its_load_drawn() -> None:
    now = read_load(has_gpu=False)
    assert 0 < now.host_used < now.host_total
    assert now.disk_free > 0
    assert now.gpu_share is None
    loads = [Load(n, 0.5, 8 << 30, 16 << 30, 5 << 30, n / 10, 23 << 30, 24 << 30, 60 + n) for n in range(10)]
    line = system_line(loads)
    for text in ("90 %", "23.0 / 24.0 GiB", "69 °C", "8.0 / 16.0 GiB", "5 GiB"):
        assert text in line
    assert line.count('class="full"') == 1, "the GPU's memory is nearly full"
    assert "GPU" not in system_line([now])
    assert system_line([]) == ""


def test_a_run_is_taken_away_as_a_zip_and_as_a_report(home: Path) -> None:
    run = make_ended_run(home / "runs", "cat")
    (home / "secret.txt").write_text("secret", encoding="utf-8")
    (run.path / "link.txt").symlink_to(home / "secret.txt")
    write_notes(run, "good <b>ears</b>")
    assert read_notes(run) == "good <b>ears</b>"
    with zipfile.ZipFile(io.BytesIO(b"".join(zip_stream(run.path)))) as archive:
        assert archive.testzip() is None
        names = {Path(name).relative_to(run.path.name).as_posix() for name in archive.namelist()}
        saved = archive.read(f"{run.path.name}/checkpoints/cat.safetensors")
    assert saved == bytes(200_000)
    assert {"run.json", "events.jsonl", "notes.txt", "samples/cat_80_0.png"} <= names
    assert not any(name.startswith("state") or name == "link.txt" for name in names)
    html = report(RunWatcher().look(run))
    assert "good &lt;b&gt;ears" in html
    assert not re.search(r'(src|href)="(?!data:)', html), "everything is inside"
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', html)
    assert len(pictures) == 8
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (64, 64)


def test_runs_differ_in_the_options_that_are_not_the_same(home: Path) -> None:
    one = make_ended_run(home / "runs", "one", learning_rate=1e-4)
    two = make_ended_run(home / "runs", "two", learning_rate=2e-4)
    two.dataset_toml.write_text(two.dataset_toml.read_text("utf-8").replace("= 512", "= 768"), encoding="utf-8")
    two.config_toml.write_text("[other_section]\n" + two.config_toml.read_text("utf-8"), encoding="utf-8")
    views = [RunWatcher().look(run) for run in (one, two)]
    assert differences(views) == {
        "dataset: datasets 1.resolution": ["512", "768"],
        "learning_rate": ["0.0001", "0.0002"],
    }


def test_a_run_fills_the_form_with_its_settings(home: Path) -> None:
    run = make_ended_run(home / "runs", "cat", learning_rate=3e-4)
    values, _ = form_values(run)
    assert (values["learning_rate"], values["network_dim"], values["output_name"]) == (3e-4, 8, "cat")
    assert values["sample_prompt_lines"] == "a cat\na dog"
    assert (str(values["image_dir"]), values["num_repeats"]) == ("/pictures", 2)
