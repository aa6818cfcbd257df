"""Curves in TensorBoard's files and in a real, offline run of wandb; what of the options goes there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.schema.base import UserError
from trainer.schema.option_reading import Given, read_options
from trainer.schema.options import Options
from trainer.train.reporting import Reporter
from trainer.train.trackers import check_trackers, logged_config, start_trackers, tracker_settings


def options(**values: object) -> Options:
    reading = read_options({name: Given(value, name) for name, value in values.items()})
    assert reading.options is not None, reading.problems
    return reading.options


def test_tensorboard_gets_every_value_under_its_name_in_the_references_folder(tmp_path: Path) -> None:
    (tracker,) = start_trackers(
        options(logging_dir=tmp_path, log_prefix="my", log_tracker_name="cat", log_config=True, network_dim=7)
    )
    reporter = Reporter(is_main=False)
    reporter.use_trackers([tracker])
    reporter.step(step=1, epoch=1, scalars={"loss/current": 0.5, "lr/unet": 1e-4, "lr/group0": 1e-4})
    reporter.validation(step=4, epoch=2, loss=0.75, train_loss=0.5, is_epoch_end=True)
    reporter.epoch(2, mean_loss=0.25)
    reporter.close()
    (folder,) = tmp_path.glob("my2*/cat")
    events = EventAccumulator(str(folder)).Reload()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in cast("list[str]", events.Tags()["scalars"])
    }
    assert found["loss/current"] == [(1, 0.5)]
    assert found["lr/group0"] == [(1, pytest.approx(1e-4))]
    assert found["loss/validation/epoch_average"] == [(2, 0.75)]
    assert found["loss/validation/epoch_divergence"] == [(2, 0.25)]
    assert found["loss/epoch_average"] == [(2, 0.25)]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_wandb_gets_the_values_with_step_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = tmp_path / "trackers.toml"
    configuration.write_text('[wandb]\nmode = "disabled"\nname = "from the file"\n', encoding="utf-8")
    (tracker,) = start_trackers(
        options(
            log_with="wandb",
            wandb_run_name="unused",
            wandb_api_key="0" * 40,
            log_tracker_config=configuration,
            log_config=True,
            network_dim=7,
            logging_dir=tmp_path / "logs",
        )
    )
    run = tracker._run  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
    sent: list[dict[str, object]] = []
    monkeypatch.setattr(run, "log", sent.append)
    reporter = Reporter(is_main=False)
    reporter.use_trackers([tracker])
    reporter.step(step=3, epoch=2, scalars={"loss/current": 0.5})
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    reporter.sample(path, step=3, epoch=2, prompt="a cat", index=1, seed=5)
    assert sent[0] == {"loss/current": 0.5, "global_step": 3, "epoch": 2}
    assert set(sent[1]) == {"sample_1", "global_step", "epoch"}
    assert run.name == "from the file"
    assert dict(run.config)["network_dim"] == 7
    assert "wandb_api_key" not in dict(run.config)
    reporter.close()


def test_keys_tokens_and_paths_are_not_logged() -> None:
    config = logged_config(
        options(
            huggingface_token="t",
            wandb_api_key="k",
            output_dir="/secret/place",
            network_dim=7,
            huggingface_repo_id="a/b",
        )
    )
    assert config["network_dim"] == 7
    assert not {"huggingface_token", "wandb_api_key", "output_dir", "pretrained_model_name_or_path"} & set(config)
    assert "/secret/place" not in str(config)


def test_a_missing_wandb_comes_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb") as caught:
        check_trackers(options(log_with="wandb"))
    assert (caught.value.exit_code, caught.value.problems[0].field) == (2, "log_with")


def test_a_wrong_configuration_of_trackers_is_found_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "trackers.toml"
    path.write_text('project = "x"\n[wanb]\nname = "y"\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        tracker_settings(options(logging_dir=tmp_path, log_tracker_config=path))
    assert ["project" in str(caught.value.problems[0]), "wanb" in str(caught.value.problems[1])] == [True, True]
    with pytest.raises(UserError, match="no-such"):
        check_trackers(options(logging_dir=tmp_path, log_tracker_config=tmp_path / "no-such.toml"))


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def log(self, scalars: object, *, place: int, step: int, epoch: int) -> None:
            raise OSError("disk full")

        def picture(self, path: Path, *, index: int, prompt: str, step: int, epoch: int) -> None: ...

        def close(self) -> None: ...

    reporter = Reporter()
    reporter.use_trackers([Failing()])
    with caplog.at_level("WARNING", logger="trainer"):
        for step in (1, 2):
            reporter.step(step=step, epoch=1, scalars={"loss/current": 0.5})
    assert [record.message for record in caplog.records] == ["Failing gets nothing more: OSError: disk full"]


def test_the_bar_shows_what_other_programs_read(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.start_training(4, 0)
    reporter.step(
        step=1, epoch=1, scalars={"loss/average": 0.5, "max_norm/keys_scaled": 3.0, "norm/avg_key_norm": 0.25}
    )
    reporter.close()
    shown = capsys.readouterr().err
    assert "steps:" in shown
    for piece in ("avr_loss=0.5", "Keys Scaled=3", "Average key norm=0.25"):
        assert piece in shown


def test_an_offline_run_of_wandb_is_written_whole_and_without_the_key(
    tmp_path: Path,
) -> None:
    key = "0123456789abcdef" * 3
    configuration = tmp_path / "trackers.toml"
    configuration.write_text('[wandb]\nmode = "offline"\n', encoding="utf-8")
    (tracker,) = start_trackers(
        options(
            log_with="wandb",
            wandb_run_name="mine",
            wandb_api_key=key[:40],
            logging_dir=tmp_path / "logs",
            log_tracker_config=configuration,
        )
    )
    run = tracker._run  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
    assert (run.name, run.settings.api_key) == ("mine", key[:40])
    tracker.log({"loss/current": 0.5}, place=1, step=1, epoch=1)
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    tracker.picture(path, index=0, prompt="a cat", step=1, epoch=1)
    tracker.close()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if file.suffix == ".wandb"]
    assert [file for file in files if file.name.startswith("sample_0")]
    assert not [file for file in files if key[:40].encode() in file.read_bytes()]
