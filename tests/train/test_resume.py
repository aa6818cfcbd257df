"""Stopping and resuming: the same weights, losses and files, bit for bit, as a run that nobody interrupted."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.lora.network import LoraNetwork
from trainer.model.weights import load_flux
from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.lora_spec import LoraSpec
from trainer.schema.options import Options
from trainer.tools.tiny_models import make_flux
from trainer.train.check import CheckedRun, check_run
from trainer.train.progress import Progress
from trainer.train.recipe import train
from trainer.train.reporting import Reporter, StopRequested
from trainer.train.resume import describe_options, differences
from trainer.train.schedule import epochs_between_saves
from trainer.train.state_saver import StateSaver, Trainables
from trainer.train.state_tree import unpack
from trainer.train.step_position import StepPosition

NOT_REPEATABLE = {"ss_training_finished_at", "modelspec.date", "ss_session_id", "ss_training_started_at"}


class Witness(Reporter):
    """Writes down what is logged of each step, and asks for a stop after so many micro-steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(is_main=False)
        self.logged: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        self._polls_left = stop_after

    def step(self, *, step: int, scalars: Any, **fields: object) -> None:
        self.logged[step] = dict(scalars)
        super().step(step=step, scalars=scalars, **fields)

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warning(self, text: str) -> None:
        self.lines.append(text)

    def should_stop(self) -> bool:
        if self._phase == "training" and self._polls_left is not None:
            self._polls_left -= 1
            if self._polls_left < 0:
                self._stop.set()
        return super().should_stop()


def words(models: TinyModels, dataset: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={output_dir}",
        "--output_name=x",
        "--device=cpu",
        "--seed=5",
        "--network_train_unet_only",
        "--t5xxl_max_token_length=16",
        "--model_prediction_type=raw",
        "--learning_rate=1e-2",
        *more,
    ]


def run(arguments: Sequence[str], stop_after: int | None = None) -> Witness:
    witness = Witness(stop_after)
    if stop_after is None:
        train(parse_command_line(arguments), witness)
    else:
        with pytest.raises(StopRequested):
            train(parse_command_line(arguments), witness)
    return witness


def same_file(path: Path, other: Path) -> bool:
    """Whether two LoRA files hold the same tensors and say the same, the moment of saving apart."""
    ours, theirs = load_file(path), load_file(other)
    with safe_open(path, "pt") as one, safe_open(other, "pt") as two:
        said, also_said = dict(one.metadata()), dict(two.metadata())
    differing = {key for key in said.keys() | also_said.keys() if said.get(key) != also_said.get(key)}
    same_tensors = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return same_tensors and differing <= NOT_REPEATABLE


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


LIVE = (
    "--network_dim=4",
    "--network_dropout=0.1",
    "--network_args",
    "rank_dropout=0.2",
    "--shuffle_caption",
    "--caption_dropout_rate=0.3",
    "--flip_aug",
    "--random_crop",
    "--blocks_to_swap=2",
    "--gradient_checkpointing",
    "--lr_scheduler=cosine",
    "--scale_weight_norms=0.5",
)
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
IN_BF16 = ("--mixed_precision=bf16", "--network_dim=2", "--network_args", "train_blocks=single")
"""A smaller model serves here: a processor without the format's instructions takes long for every product."""


@pytest.mark.parametrize(
    ("settings", "num_epochs"),
    [
        # Two epochs where a step takes long: encoding in each step, or 16 bit on a processor.
        (LIVE, 2),
        ((*CACHED, "--network_dim=32", "--optimizer_type=AdamW8bit"), 3),
        ((*CACHED, "--network_args", "pissa=True"), 3),
        ((*CACHED, "--network_args", "ggpo_sigma=0.03", "ggpo_beta=0.01", "--mixed_precision=fp16"), 2),
        ((*CACHED, "--network_module=networks.oft_flux", "--network_dim=4", "--network_alpha=0.001"), 3),
        ((*CACHED, *IN_BF16), 2),
        ((*CACHED, *IN_BF16, "--full_bf16"), 2),
    ],
    ids=["live", "8bit", "pissa", "ggpo-fp16", "oft", "bf16", "full-bf16"],
)
def test_a_run_stopped_amid_an_accumulation_goes_on_to_the_same_bits(
    tiny_models: TinyModels, tmp_path: Path, settings: tuple[str, ...], num_epochs: int
) -> None:
    if any("8bit" in word for word in settings):
        pytest.importorskip("bitsandbytes")
    is_small = "--mixed_precision=bf16" in settings
    dataset = make_tiny_dataset(tmp_path / "data", count=5, resolution=64)
    if is_small:
        model = make_flux(tmp_path / "flux.safetensors", hidden=64, heads=2, depth=1, depth_single=1)
        settings = (*settings, f"--pretrained_model_name_or_path={model}")
    # Five batches make steps of 2, 2 and 1 micro-steps: step 5 is the second one of the second epoch.
    course = (
        "--gradient_accumulation_steps=2",
        f"--max_train_epochs={num_epochs}",
        "--save_every_n_steps=4",
        *settings,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = run(words(tiny_models, dataset, whole, *course))
    stopped = run(words(tiny_models, dataset, parts, *course, "--save_state"), stop_after=8)
    assert sorted(stopped.logged) == [1, 2, 3, 4], "the fifth step was cut off after its first micro-step"
    state = parts / "x-step00000004-state"
    assert names(state) == {
        "state.json", "train_state.json", "network.safetensors", "optimizer.safetensors", "random.safetensors",
    }  # fmt: skip
    assert json.loads((state / "train_state.json").read_text()) == {"current_epoch": 2, "current_step": 4}
    resumed = run(words(tiny_models, dataset, parts, *course, f"--resume={state}"))
    assert {**stopped.logged, **resumed.logged} == uninterrupted.logged
    assert sorted(resumed.logged) == list(range(5, 3 * num_epochs + 1))
    files = {name for name in names(whole) if name.endswith(".safetensors")}
    steps = range(4, 3 * num_epochs, 4)
    assert files == {"x.safetensors", *(f"x-step{step:08d}.safetensors" for step in steps)}
    assert files == {name for name in names(parts) if name.endswith(".safetensors")}
    assert all(same_file(whole / name, parts / name) for name in files)
    sessions = {safe_open(parts / name, "pt").metadata()["ss_session_id"] for name in files}
    assert len(sessions) == 1, "a resumed run is still the same one"


def steady(*more: str) -> tuple[str, ...]:
    """A short run without anything special."""
    return (*CACHED, "--network_dim=4", "--max_train_steps=6", *more)


class Payload:
    """Pickles into something that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._path,)


def as_reference_state(state: Path, lora: Path, folder: Path) -> Path:
    """The same moment in the reference trainer's files, with a generator file that is an attack. Returns the mark that
    it would leave."""
    folder.mkdir()
    shutil.copy(lora, folder / "model.safetensors")
    shutil.copy(state / "train_state.json", folder)
    tree = json.loads((state / "state.json").read_text())["optimizer"]
    torch.save(unpack(tree, load_file(state / "optimizer.safetensors"))["state"], folder / "optimizer.bin")
    mark = folder / "was run"
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps(Payload(mark)))
    return mark


def test_a_state_of_sd_scripts_gives_lora_optimizer_and_position_and_runs_no_code(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    dataset = make_tiny_dataset(tmp_path / "data", count=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = steady("--lr_scheduler=linear")
    uninterrupted = run(words(tiny_models, dataset, whole, *arguments, "--save_state", "--save_every_n_steps=2"))
    foreign = tmp_path / "foreign-state"
    mark = as_reference_state(whole / "x-step00000002-state", whole / "x-step00000002.safetensors", foreign)
    resumed = run(words(tiny_models, dataset, parts, *arguments, f"--resume={foreign}"))
    assert sorted(resumed.logged) == [3, 4, 5, 6]
    for name in ("loss/current", "norm/grad_norm"):
        assert [resumed.logged[step][name] for step in (3, 4, 5, 6)] == [
            uninterrupted.logged[step][name] for step in (3, 4, 5, 6)
        ]
    final, expected = load_file(parts / "x.safetensors"), load_file(whole / "x.safetensors")
    assert all(torch.equal(final[key], expected[key]) for key in expected)
    (line,) = (line for line in resumed.lines if line.startswith("a state of sd-scripts"))
    assert "taken are the LoRA, the position (step 2), the optimizer; not taken are the random generators" in line
    assert not mark.exists()

    (foreign / "optimizer.bin").write_bytes((foreign / "random_states_0.pkl").read_bytes())
    resumed = run(words(tiny_models, dataset, parts, *arguments, f"--resume={foreign}"))
    assert "optimizer.bin cannot be read" in next(line for line in resumed.lines if line.startswith("a state of"))
    assert not mark.exists()


@pytest.fixture(scope="module")
def saved(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with states after steps 2, 4 and 6, and its dataset beside it."""
    folder = tmp_path_factory.mktemp("saved")
    dataset = make_tiny_dataset(folder / "data", count=4)
    run(words(tiny_models, dataset, folder / "out", *steady("--save_state", "--save_every_n_steps=2")))
    return folder / "out"


def checked(models: TinyModels, saved: Path, *more: str) -> tuple[CheckedRun, list[str]]:
    witness = Witness()
    dataset = saved.parent / "data" / "dataset.toml"
    return check_run(parse_command_line(words(models, dataset, saved, *more)), witness), witness.lines


def test_states_stand_beside_the_loras_and_the_final_one_says_where_it_ended(saved: Path) -> None:
    assert {path.name for path in saved.glob("*-state")} == {
        "x-step00000002-state", "x-step00000004-state", "x-step00000006-state", "x-state",
    }  # fmt: skip
    assert json.loads((saved / "x-state" / "train_state.json").read_text()) == {"current_epoch": 2, "current_step": 6}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (("--network_dim=8",), "network_dim"),
        (("--network_alpha=2",), "network_alpha"),
        (("--network_args", "split_qkv=True"), "network_args"),
        (("--optimizer_type=AdamW8bit",), "optimizer_type"),
        (("--unet_lr=0",), "learning_rate"),
    ],
)
def test_what_the_state_has_no_place_for_is_refused_by_name(
    tiny_models: TinyModels, saved: Path, more: tuple[str, ...], field: str
) -> None:
    with pytest.raises(UserError) as error:
        checked(tiny_models, saved, *steady(f"--resume={saved / 'x-step00000004-state'}", *more))
    assert [problem.field for problem in error.value.problems] == [field]
    assert error.value.exit_code == 2


def test_what_changes_the_course_is_named_and_what_does_not_is_not(tiny_models: TinyModels, saved: Path) -> None:
    resume = f"--resume={saved / 'x-step00000004-state'}"
    free = ("--output_name=y", "--save_every_n_steps=1", "--gradient_checkpointing", "--blocks_to_swap=1")
    _, lines = checked(tiny_models, saved, *steady(resume, *free, "--max_train_steps=50"))
    assert not [line for line in lines if "differ" in line]
    _, lines = checked(tiny_models, saved, *steady(resume, "--learning_rate=0.5", "--seed=6", "--caption_prefix=a "))
    (settings,) = (line for line in lines if line.startswith("settings differ"))
    assert "learning_rate was 0.01 and is 0.5" in settings
    assert "seed was 5 and is 6" in settings
    assert "lr_scheduler" not in settings
    (saved.parent / "data" / "images").joinpath("added.png").write_bytes(
        next((saved.parent / "data" / "images").glob("*.png")).read_bytes()
    )
    try:
        _, lines = checked(tiny_models, saved, *steady(resume))
    finally:
        (saved.parent / "data" / "images" / "added.png").unlink()
    assert any(line.startswith("pictures, captions or their settings differ") for line in lines)


def test_a_longer_run_is_a_change_only_where_the_schedule_looks_at_the_end() -> None:
    for schedule, is_named in (("constant", False), ("cosine", True)):
        before, after = (
            parse_command_line([f"--lr_scheduler={schedule}", f"--max_train_steps={steps}"]).options
            for steps in (10, 20)
        )
        common = {"models": {}, "data_sha256": "x", "num_processes": 1}
        saved = {**common, "options": describe_options(before), "options_sha256": "before"}
        now = {**common, "options": describe_options(after), "options_sha256": "after"}
        assert any("max_train_steps was 10 and is 20" in line for line in differences(saved, now, after)) == is_named


def test_the_start_may_be_moved_and_must_leave_a_step(tiny_models: TinyModels, saved: Path) -> None:
    state = f"--resume={saved / 'x-step00000004-state'}"
    for more, step in (
        ((), 0),
        (("--initial_epoch=2",), 4),
        (("--initial_epoch=2", "--initial_step=3"), 3),
        ((state,), 4),
        ((state, "--initial_step=1"), 1),
        ((state, "--initial_epoch=1"), 0),
    ):
        run, lines = checked(tiny_models, saved, *steady(*more))
        assert run.start.progress.step == step, more
        assert any("though the state is that of step 4" in line for line in lines) == (len(more) == 2 and state in more)
    for more in ((f"--resume={saved / 'x-state'}",), ("--initial_step=6",)):
        with pytest.raises(UserError, match="no step is left to train: 6 are done and the run has 6"):
            checked(tiny_models, saved, *steady(*more))


@pytest.mark.parametrize("file", ["state.json", "network.safetensors", "optimizer.safetensors", "random.safetensors"])
def test_a_damaged_state_is_named_before_anything_loads(
    tiny_models: TinyModels, saved: Path, tmp_path: Path, file: str
) -> None:
    broken = tmp_path / "x-state"
    shutil.copytree(saved / "x-step00000004-state", broken)
    (broken / file).write_bytes((broken / file).read_bytes()[:-7])
    with pytest.raises(UserError, match=f"the state is damaged: {file} cannot be read") as error:
        checked(tiny_models, saved, *steady(f"--resume={broken}"))
    assert error.value.problems[0].where == str(broken)


def test_a_run_folder_goes_on_from_its_newest_good_state(tiny_models: TinyModels, saved: Path, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        shutil.copytree(saved / f"x-step{step:08d}-state", tmp_path / "state" / f"step-{step:06d}")
    damaged = tmp_path / "state" / "step-000006" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / "state" / ".step-000008.12345678.tmp").mkdir()
    run, lines = checked(tiny_models, saved, *steady(f"--run_dir={tmp_path}"))
    assert run.start.progress.step == 4
    assert any("the state is damaged" in line and "step-000006" in line for line in lines)


def test_a_start_without_a_state_moves_counters_schedule_and_data(
    tiny_models: TinyModels, saved: Path, tmp_path: Path
) -> None:
    dataset = saved.parent / "data" / "dataset.toml"
    arguments = steady("--lr_scheduler=linear", "--save_every_n_steps=5", "--initial_step=4")
    moved = run(words(tiny_models, dataset, tmp_path, *arguments))
    assert {step: logged["lr/unet"] for step, logged in moved.logged.items()} == pytest.approx(
        {5: 1e-2 * 2 / 6, 6: 1e-2 * 1 / 6}
    )
    assert names(tmp_path) == {"x-step00000005.safetensors", "x.safetensors"}


def test_old_states_go_with_the_settings_of_their_own(tiny_models: TinyModels, saved: Path, tmp_path: Path) -> None:
    dataset = saved.parent / "data" / "dataset.toml"
    arguments = ("--save_state", "--save_every_n_epochs=1", "--save_last_n_epochs=3", "--save_last_n_epochs_state=1")
    run(words(tiny_models, dataset, tmp_path, *CACHED, "--max_train_epochs=4", *arguments))
    assert names(tmp_path) == {
        "x-000001.safetensors", "x-000002.safetensors", "x-000003.safetensors", "x.safetensors",
        "x-000003-state", "x-state",
    }  # fmt: skip


def test_a_run_folder_keeps_one_state_at_distances_that_grow_with_the_run(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    moments = [0.0]
    flux = load_flux(tiny_models.flux_dev, torch.float32, "cpu")
    network = LoraNetwork.attach(flux, None, LoraSpec(rank=1, alpha=1), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trained = Trainables(network, optimizer, schedule, scaler, torch.device("cpu"), 0, 1, lambda value: [value])
    states = StateSaver(
        trained,
        Options(run_dir=tmp_path, output_dir=tmp_path),
        {"seed": 1, "options": {}},
        Reporter(is_main=False),
        position_after=lambda step: StepPosition(step, 1),
        requested=set(),
        # One moment for each look: a state looks twice, before and after it is written.
        clock=lambda: moments.pop(0) if len(moments) > 1 else moments[0],
    )

    def is_due(moment: float) -> bool:
        moments[:] = [moment]
        return states.is_due()

    def save(step: int, moment: float, seconds: float) -> None:
        moments[:] = [moment, moment + seconds]
        states(Progress(step), "moment")
        assert [path.name for path in (tmp_path / "state").iterdir()] == [f"step-{step:06d}"]

    assert (is_due(9.0), is_due(10.0)) == (False, True)
    save(1, 10.0, 0.0)
    assert (is_due(19.0), is_due(20.0)) == (False, True)
    save(2, 40.0, 0.0)
    assert (is_due(79.0), is_due(80.0)) == (False, True), "as long again as the run was"
    save(3, 1000.0, 0.0)
    assert (is_due(1299.0), is_due(1300.0)) == (False, True), "five minutes at most"
    save(4, 2000.0, 8.0)
    assert (is_due(2400.0), is_due(2408.0)) == (False, True), "a slow disk takes 2 % of the time"
    states.save_final(Progress(5))
    assert list((tmp_path / "state").iterdir()) == [], "of no use any more"


def test_the_ratio_spreads_saves_over_the_epochs() -> None:
    def every(epochs: int, *words: str) -> int | None:
        return epochs_between_saves(parse_command_line(words).options, epochs)

    assert every(10, "--save_n_epoch_ratio=5", "--save_every_n_epochs=7") == 2
    assert every(10, "--save_n_epoch_ratio=3") == 3
    assert every(2, "--save_n_epoch_ratio=9") == 1
    assert every(10, "--save_n_epoch_ratio=0", "--save_every_n_epochs=7") == 7
