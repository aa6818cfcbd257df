"""Upload to the hub, through a client that stands in for the hub's own and writes down what it is asked."""

from __future__ import annotations

import threading
from pathlib import Path

import huggingface_hub
import pytest

from trainer.schema.option_files import options_to_toml
from trainer.schema.option_reading import Given, read_options
from trainer.schema.options import Options
from trainer.train.hub_upload import HubUploader

TOKEN = "hf_secret"


class FakeHub:
    """The calls of `huggingface_hub.HfApi` that are used."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.repos: list[tuple[str, str | None, bool]] = []
        self.files: list[tuple[str, str, bytes]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def create_repo(self, repo_id: str, *, repo_type: str | None, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repos.append((repo_id, repo_type, private))

    def upload_file(
        self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str | None, commit_message: str
    ) -> None:
        assert self.may_go_on.wait(30)
        if self.fails:
            raise ConnectionError(f"401 for {TOKEN}")
        self.files.append((repo_id, path_in_repo, Path(path_or_fileobj).read_bytes()))

    def upload_folder(
        self, *, folder_path: str, path_in_repo: str, repo_id: str, repo_type: str | None, commit_message: str
    ) -> None:
        raise AssertionError("no test here has a folder")


class Told:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []


def uploader(hub: FakeHub, told: Told, *, is_async: bool = False, folder: str | None = None) -> HubUploader:
    return HubUploader(
        hub,
        "me/lora",
        folder=folder,
        is_async=is_async,
        secret=TOKEN,
        note=told.notes.append,
        warn=told.warnings.append,
    )


def file(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(name.encode())
    return path


def test_files_go_into_the_folder_of_a_repository_made_once(tmp_path: Path) -> None:
    hub, told = FakeHub(), Told()
    upload = uploader(hub, told, folder="/loras/")
    upload(file(tmp_path, "a.safetensors"), is_final=False)
    upload(file(tmp_path, "b.safetensors"), is_final=True)
    upload.close()
    assert hub.repos == [("me/lora", None, True)]
    assert hub.files == [
        ("me/lora", "loras/a.safetensors", b"a.safetensors"),
        ("me/lora", "loras/b.safetensors", b"b.safetensors"),
    ]
    assert told.notes == ["uploaded a.safetensors to me/lora", "uploaded b.safetensors to me/lora"]


def test_an_upload_aside_does_not_hold_up_training_and_the_final_one_waits(tmp_path: Path) -> None:
    hub, told = FakeHub(), Told()
    hub.may_go_on.clear()
    upload = uploader(hub, told, is_async=True)
    upload(file(tmp_path, "a.safetensors"), is_final=False)
    assert hub.files == []
    hub.may_go_on.set()
    upload(file(tmp_path, "b.safetensors"), is_final=True)
    assert [name for _, name, _ in hub.files] == ["a.safetensors", "b.safetensors"]
    upload.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failed_upload_is_a_warning_without_the_token(tmp_path: Path, is_async: bool) -> None:
    told = Told()
    upload = uploader(FakeHub(fails=True), told, is_async=is_async)
    upload(file(tmp_path, "a.safetensors"), is_final=False)
    upload.close()
    assert told.warnings == ["a.safetensors was not uploaded to me/lora; it is kept here: ConnectionError: 401 for ***"]


def options(**values: object) -> Options:
    made = read_options({name: Given(value, name) for name, value in values.items()}).options
    assert made is not None
    return made


def test_the_options_reach_the_hubs_client_and_nothing_is_uploaded_without_a_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told, tokens, hub = Told(), list[str | None](), FakeHub()

    def make(token: str | None = None) -> FakeHub:
        tokens.append(token)
        return hub

    monkeypatch.setattr(huggingface_hub, "HfApi", make)
    assert HubUploader.from_options(options(), note=told.notes.append, warn=told.warnings.append) is None
    assert tokens == []
    made = options(
        huggingface_repo_id="me/lora",
        huggingface_repo_type="model",
        huggingface_path_in_repo="x",
        huggingface_token=TOKEN,
        huggingface_repo_visibility="public",
        async_upload=True,
    )
    upload = HubUploader.from_options(made, note=told.notes.append, warn=told.warnings.append)
    assert upload is not None
    upload(file(tmp_path, "a.safetensors"), is_final=False)
    upload.close()
    assert tokens == [TOKEN]
    assert hub.repos == [("me/lora", "model", False)]
    assert [name for _, name, _ in hub.files] == ["x/a.safetensors"]


def test_no_secret_is_written_into_an_options_file() -> None:
    made = options(huggingface_repo_id="me/lora", huggingface_token=TOKEN, log_with="wandb", wandb_api_key="k3y")
    written = options_to_toml(made)
    assert "me/lora" in written
    assert TOKEN not in written
    assert "k3y" not in written


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"huggingface_repo_id": "lora"}, "huggingface_repo_id is lora; it must be owner/name"),
        ({"huggingface_repo_type": "modell"}, "huggingface_repo_type is modell; it must be model, dataset or space"),
    ],
)
def test_wrong_names_are_problems(values: dict[str, object], what: str) -> None:
    (problem,) = read_options({name: Given(value, name) for name, value in values.items()}).problems
    assert problem.what == what


def test_hub_options_without_a_repository_have_no_effect_and_say_so() -> None:
    reading = read_options({"huggingface_token": Given(TOKEN, "x"), "async_upload": Given(True, "x")})
    lines = [note for note in reading.notes if "no effect" in note]
    assert lines == [
        "huggingface_token has no effect: huggingface_repo_id is not given",
        "async_upload has no effect: huggingface_repo_id is not given",
    ]
