"""The contract between page and worker: a real worker in a run folder, commanded by files, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fluxgui.run_state import NUM_LEVELS, RunState, fold
from tests.runs.commands import start_run_folder, wait_until
from tests.runs.in_process import answer
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.schema.events import EventReader
from trainer.schema.run_folder import RunFolder

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


def events_of(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event for event in EventReader(run.events_jsonl).read_new() if event["kind"] == kind]


class Worker:
    """A run folder with its worker process."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.process = start_run_folder(run.path)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events_of(self.run, kind)

    def wait_for(self, kind: str, count: int = 1) -> dict[str, Any]:
        wait_until(lambda: len(self.events(kind)) >= count or self.process.poll() is not None, what=f"{count} x {kind}")
        found = self.events(kind)
        assert len(found) >= count, self.log()
        return found[count - 1]

    def finish(self) -> int:
        return self.process.wait(timeout=120)

    def log(self) -> str:
        return self.run.worker_log.read_text(encoding="utf-8")


def make_run(models: TinyModels, folder: Path, **more: object) -> RunFolder:
    dataset = make_tiny_dataset(folder, count=2)
    values: dict[str, object] = {
        **dict(argument.removeprefix("--").split("=", 1) for argument in models.arguments()),
        "output_name": "lora",
        "network_module": "networks.lora_flux",
        "network_dim": 4,
        "network_train_unet_only": True,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "t5xxl_max_token_length": 16,
        "max_train_steps": 100_000,
        "learning_rate": 1e-3,
        "seed": 1,
        **more,
    }
    config = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()) + "\n"
    return RunFolder.create(
        folder / "runs",
        "a test",
        config_toml=config,
        dataset_toml=dataset.read_text(encoding="utf-8"),
        sample_prompts="a red circle --w 64 --h 64 --s 2 --d 1\n",
        info={"name": "a test"},
    )


@pytest.fixture
def worker(tiny_models: TinyModels, tmp_path: Path) -> Iterator[Worker]:
    started = Worker(make_run(tiny_models, tmp_path))
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()


def test_save_sample_pause_resume_and_stop(worker: Worker) -> None:
    run = worker.run
    worker.wait_for("step", 3)
    run.send_command("save")
    saved = worker.wait_for("checkpoint")
    assert load_file(run.path / str(saved["path"]))
    run.send_command("sample")
    sample = worker.wait_for("sample")
    assert (run.path / str(sample["path"])).is_file()
    assert (run.path / str(sample["path"])).is_relative_to(run.samples_dir)
    assert "red circle" in str(sample["prompt"])
    run.send_command("pause")
    worker.wait_for("paused")
    num_steps = len(worker.events("step"))
    run.send_command("resume")
    worker.wait_for("resumed")
    worker.wait_for("step", num_steps + 2)
    run.send_command("stop")
    assert worker.finish() == 0, worker.log()
    (finished,) = worker.events("run_finished")
    assert finished["outcome"] == "stopped"
    final = worker.events("checkpoint")[-1]
    assert final["step"] == finished["steps"]
    assert load_file(run.path / str(final["path"]))
    names = [event["name"] for event in worker.events("command")]
    assert names == ["save", "sample", "pause", "resume", "stop"]
    assert not [path for path in run.control_dir.iterdir() if path.suffix == ".json"], "commands are moved to done/"


def test_a_worker_has_its_own_group_keeps_a_second_out_and_stops_at_a_signal_like_at_the_command(
    worker: Worker,
) -> None:
    worker.wait_for("step", 2)
    if os.name != "nt":  # process groups are POSIX
        assert os.getpgid(worker.process.pid) != os.getpgid(0), "it outlives the group that started it"
    refused = answer("run", str(worker.run.path))
    assert refused.code == 3
    assert "another worker" in refused.output
    assert worker.process.poll() is None

    worker.process.send_signal(signal.SIGTERM)
    assert worker.finish() == 0, worker.log()
    (finished,) = worker.events("run_finished")
    assert finished["outcome"] == "stopped"
    assert worker.events("checkpoint")
    assert [path.name for path in worker.run.state_dir.iterdir()] == [f"step-{finished['steps']:06d}"]


def test_a_killed_worker_leaves_no_half_file_and_frees_the_lock(worker: Worker) -> None:
    worker.wait_for("step", 2)
    worker.run.send_command("save")
    saved = worker.wait_for("checkpoint")
    state = worker.run.state_dir / f"step-{saved['step']:06d}"
    wait_until(state.is_dir, what="the state that goes along with the LoRA")
    worker.process.kill()
    worker.process.wait()
    assert not worker.events("run_finished")
    for path in worker.run.checkpoints_dir.rglob("*.safetensors"):
        assert load_file(path)
    again = Worker(worker.run)
    try:
        assert again.wait_for("plan", 2)["first_step"] == saved["step"]
        again.wait_for("step", len(worker.events("step")) + 1)
        assert {event["attempt"] for event in again.events("run_started")} == {1, 2}
        points = fold(RunState(), EventReader(worker.run.events_jsonl).read_new()).points
        assert [point.step for point in points] == list(range(1, len(points) + 1)), "no gap, no double"
    finally:
        again.process.kill()
        again.process.wait()


def test_events_follow_the_contract(tiny_models: TinyModels, tmp_path: Path) -> None:
    run = make_run(
        tiny_models,
        tmp_path,
        max_train_steps=4,
        sample_at_first=True,
        sample_every_n_epochs=1,
        save_every_n_epochs=1,
    )
    done = answer("run", str(run.path))
    assert done.code == 0, done.output
    events = EventReader(run.events_jsonl).read_new()
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    kinds = [str(event["kind"]) for event in events]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert events[-1]["outcome"] == "completed"
    (plan,) = events_of(run, "plan")
    assert plan["num_steps"] == 4
    assert plan["num_images"] == 2
    phases = [event["name"] for event in events_of(run, "phase")]
    for earlier, later in (("check", "text"), ("text", "latents"), ("latents", "model"), ("model", "training")):
        assert phases.index(earlier) < phases.index(later)
    steps = events_of(run, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step["loss"] > 0
        # One picture a step: its loss stands at the noise level that it drew.
        assert [loss for loss in step["level_losses"] if loss is not None] == [pytest.approx(step["loss"])]
        assert len(step["level_losses"]) == NUM_LEVELS
        assert step["step_seconds"] > 0
        assert step["lr"] == pytest.approx(1e-3)
    assert len(events_of(run, "sample")) == 3, "before the first step and after two epochs"
    checkpoints = events_of(run, "checkpoint")
    assert [checkpoint["is_final"] for checkpoint in checkpoints] == [False, True]
    for checkpoint in checkpoints:
        path = run.path / str(checkpoint["path"])
        assert path.is_relative_to(run.checkpoints_dir)
        assert path.stat().st_size == checkpoint["bytes"]


def test_a_failed_run_says_so_in_its_events(tiny_models: TinyModels, tmp_path: Path) -> None:
    run = make_run(tiny_models, tmp_path, ae=str(tmp_path / "nowhere.safetensors"))
    done = answer("run", str(run.path))
    assert done.code == 3, done.output
    (error,) = events_of(run, "error")
    assert "does not exist" in str(error["message"])
    assert events_of(run, "run_finished")[0]["outcome"] == "failed"


def test_two_runs_on_one_device_take_turns(tiny_models: TinyModels, tmp_path: Path) -> None:
    first = Worker(make_run(tiny_models, tmp_path / "a"))
    try:
        first.wait_for("step")
        second = Worker(make_run(tiny_models, tmp_path / "b", max_train_steps=1))
        wait_until(
            lambda: any(event["name"] == "waiting" for event in second.events("phase")), what="the second run to wait"
        )
        assert not second.events("step")
        first.run.send_command("stop")
        assert first.finish() == 0
        assert second.finish() == 0, second.log()
    finally:
        for process in (first.process,):
            if process.poll() is None:
                process.kill()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert answer("run", str(tmp_path / "empty")).code in (2, 3)
