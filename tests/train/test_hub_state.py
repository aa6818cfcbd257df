"""States that go to the hub and come back, through a client that stands in for the hub's own and keeps folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from tests.tiny import TinyModels, make_tiny_dataset
from trainer.schema.base import UserError
from trainer.schema.cli import parse_command_line
from trainer.schema.hub_place import HubPlace, parse_hub_place
from trainer.schema.option_reading import Given, read_options
from trainer.train.check import check_run
from trainer.train.hub_state import fetch_state
from trainer.train.hub_upload import HubUploader
from trainer.train.recipe import train
from trainer.train.reporting import Reporter

TOKEN = "hf_secret"
STATE = "lo[r]as/x-step00000002-state"
LOCAL = Path("me/lora", STATE)


class LocalHub:
    """The calls of `huggingface_hub.HfApi` that are used, on one repository that is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.tokens: list[str | None] = []
        self.fails: Exception | None = None

    def open(self, token: str | None = None) -> LocalHub:
        self.tokens.append(token)
        return self

    def put(self, *names: str) -> None:
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(name, encoding="utf-8")

    def create_repo(self, repo_id: str, *, repo_type: str | None, private: bool, exist_ok: bool) -> None:
        assert private
        assert exist_ok

    def upload_file(
        self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str | None, commit_message: str
    ) -> None:
        (self.folder / path_in_repo).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path_or_fileobj, self.folder / path_in_repo)

    def upload_folder(
        self, *, folder_path: str, path_in_repo: str, repo_id: str, repo_type: str | None, commit_message: str
    ) -> None:
        if self.fails is not None:
            raise self.fails
        shutil.copytree(folder_path, self.folder / path_in_repo)

    def list_repo_files(self, repo_id: str, *, revision: str | None, repo_type: str | None) -> list[str]:
        self.asked.append((repo_id, revision, repo_type))
        if self.fails is not None:
            raise self.fails
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def snapshot_download(
        self, repo_id: str, *, repo_type: str | None, revision: str | None, cache_dir: Path, allow_patterns: list[str]
    ) -> str:
        snapshot = cache_dir / "snapshot"
        names = self.list_repo_files(repo_id, revision=revision, repo_type=repo_type)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, snapshot / name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    made = LocalHub(tmp_path / "hub")
    answer = tmp_path / "endpoint"
    answer.touch()
    monkeypatch.setattr(huggingface_hub, "HfApi", made.open)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", answer.as_uri())
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return made


class Witness(Reporter):
    def __init__(self) -> None:
        super().__init__(is_main=False)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    warning = note


@pytest.mark.parametrize("is_async", [False, True])
def test_a_state_goes_to_the_hub_and_another_run_goes_on_from_it(
    hub: LocalHub, tiny_models: TinyModels, tmp_path: Path, is_async: bool
) -> None:
    output = tmp_path / "out"
    words = [
        *tiny_models.arguments(),
        f"--dataset_config={make_tiny_dataset(tmp_path / 'data', count=2)}",
        f"--output_dir={output}",
        "--output_name=x",
        "--device=cpu",
        "--seed=5",
        "--network_train_unet_only",
        "--network_dim=2",
        "--network_args",
        "train_blocks=single",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=16",
        "--model_prediction_type=raw",
        f"--huggingface_token={TOKEN}",
        "--max_train_steps=4",
    ]
    uploads = ["--save_state", "--save_every_n_steps=2", "--huggingface_repo_id=me/lora", "--save_state_to_huggingface"]
    uploads += ["--huggingface_path_in_repo=lo[r]as", *(["--async_upload"] if is_async else [])]
    train(parse_command_line([*words, *uploads, "--save_last_n_steps_state=1"]), Witness())
    states = {"x-step00000002-state", "x-step00000004-state", "x-state"}
    assert {path.name for path in output.glob("*-state")} == states - {"x-step00000002-state"}, "gone after its upload"
    assert {path.name for path in (hub.folder / "lo[r]as").iterdir()} == {
        "x-step00000002.safetensors", "x-step00000004.safetensors", "x.safetensors", *states,
    }  # fmt: skip
    assert {path.name for path in (hub.folder / STATE).iterdir()} == {
        "state.json", "train_state.json", "network.safetensors", "optimizer.safetensors", "random.safetensors",
    }  # fmt: skip

    witness = Witness()
    place = f"--resume={LOCAL.as_posix()}:refs/pr/1"
    checked = check_run(parse_command_line([*words, "--resume_from_huggingface", place]), witness)
    assert checked.start.progress.step == 2
    assert checked.start.own is not None
    assert checked.start.own.path == tmp_path / "cache" / "snapshot" / STATE
    assert {path.parent for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {checked.start.own.path}
    assert set(hub.asked) == {("me/lora", "refs/pr/1", "model")}
    assert set(hub.tokens) == {TOKEN}
    assert not [line for line in witness.lines if TOKEN in line or "no effect" in line]

    # What is wrong elsewhere is said without asking the hub.
    hub.asked.clear()
    with pytest.raises(UserError, match=r"no\.txt"):
        check_run(parse_command_line([*words, "--resume_from_huggingface", place, "--sample_prompts=no.txt"]), witness)
    assert hub.asked == []


def test_a_state_that_is_not_uploaded_is_a_warning_without_the_token(hub: LocalHub, tmp_path: Path) -> None:
    hub.fails, told = ConnectionError(f"401 for {TOKEN}"), list[str]()
    upload = HubUploader(hub, "me/lora", secret=TOKEN, is_async=True, note=told.append, warn=told.append)
    upload.state(tmp_path)
    upload.close()
    assert told == [f"{tmp_path.name} was not uploaded to me/lora; it is kept here: ConnectionError: 401 for ***"]


def _refusal(kind: type[HfHubHTTPError]) -> Exception:
    # Without the answer that it comes from: that is an object of whatever library the hub's client uses.
    return kind.__new__(kind, f"404 for {TOKEN}")


@pytest.mark.parametrize(
    ("failure", "what", "hint"),
    [
        (_refusal(GatedRepoError), "only to those who have agreed", "Agree at "),
        (_refusal(RepositoryNotFoundError), "the hub shows no model repository me/lora", "HF_TOKEN"),
        (_refusal(RevisionNotFoundError), "me/lora has no revision v2", "a branch, a tag or a commit"),
        (TimeoutError(f"no answer, {TOKEN}"), "cannot be fetched (TimeoutError: no answer, ***)", "Try again"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly_and_without_the_token(
    hub: LocalHub, failure: Exception, what: str, hint: str
) -> None:
    hub.fails = failure
    with pytest.raises(UserError) as error:
        fetch_state(Path(f"{LOCAL}:v2"), token=TOKEN, announce=print)
    (problem,) = error.value.problems
    assert what in problem.what
    assert hint in (problem.hint or "")
    assert (error.value.exit_code, problem.field, problem.where) == (3, "resume", f"{LOCAL.as_posix()}:v2")
    assert TOKEN not in str(error.value)


def test_a_folder_that_is_not_there_is_named_with_those_that_are(hub: LocalHub) -> None:
    hub.put("a-state/train_state.json", "b/c-state/train_state.json", "b/c.safetensors", f"{STATE}/deeper/file")
    with pytest.raises(UserError, match=r"me/lora has no folder lo\[r\]as/x-step00000002-state with files") as error:
        fetch_state(LOCAL, token=None, announce=print)
    assert error.value.problems[0].hint == "States in it: a-state, b/c-state."
    assert hub.asked == [("me/lora", None, "model")]


def test_a_hub_out_of_reach_is_said_at_once(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fetch_state(LOCAL, token=None, announce=print)
    assert hub.tokens == []


def test_places_on_the_hub_are_read_as_the_reference_reads_them() -> None:
    assert parse_hub_place(Path("o/n/a/b")) == HubPlace("o/n", "a/b", None, "model")
    assert parse_hub_place(Path("o/n/a:v1")) == HubPlace("o/n", "a", "v1", "model")
    assert parse_hub_place(Path("o/n/a:refs/pr/1:dataset")) == HubPlace("o/n", "a", "refs/pr/1", "dataset")


@pytest.mark.parametrize("text", ["o/n", "/o/n/a", "o/n/../a", "o/n/a:b:model:c", "o/n/a:b:modell"])
def test_what_is_no_place_on_the_hub_is_a_problem_with_the_option(text: str) -> None:
    values = {"resume": Given(text, "x"), "resume_from_huggingface": Given(True, "x")}
    (problem,) = read_options(values).problems
    assert problem.field == "resume"
    assert f"resume is {text}, which is no place on the hub: it" in problem.what


def test_what_has_no_effect_is_said() -> None:
    def lines(**values: object) -> list[str]:
        reading = read_options({name: Given(value, "x") for name, value in values.items()})
        return [note for note in reading.notes if "no effect" in note]

    assert lines(save_state_to_huggingface=True) == [
        "save_state_to_huggingface has no effect: huggingface_repo_id is not given"
    ]
    assert lines(save_state_to_huggingface=True, huggingface_repo_id="me/lora") == [
        "save_state_to_huggingface has no effect: no states are saved (save_state, save_state_on_train_end)"
    ]
    assert lines(save_state_to_huggingface=True, huggingface_repo_id="me/lora", save_state_on_train_end=True) == []
    assert lines(resume_from_huggingface=True) == ["resume_from_huggingface has no effect: resume is not given"]
    assert lines(resume_from_huggingface=True, resume="o/n/a", huggingface_token=TOKEN) == []
