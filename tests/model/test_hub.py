"""Hub ids: what is one, and what happens when its files are not on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainer.model import hub
from trainer.schema.base import UserError
from trainer.schema.cli import check_files, validate_options
from trainer.schema.hub_cache import cache_folder, hub_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("models/flux1-dev.safetensors", None),
        ("flux1-dev", None),
        ("/models/flux", None),
        ("../models/flux", None),
        ("a/b/c", None),
        ("here/flux", None),
    ],
)
def test_hub_ids_are_told_from_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str | None
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id(Path(text)) == expected


def test_the_cache_is_where_the_hubs_library_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"


def test_a_model_that_cannot_be_fetched_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="owner/name is not whole in the local Hugging Face cache") as caught:
        hub.fetch_model(Path("owner/name"), "flux", "pretrained_model_name_or_path", print)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert (caught.value.exit_code, caught.value.problems[0].field) == (3, "pretrained_model_name_or_path")


def test_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    hub.fetch_model(tmp_path, "flux", "pretrained_model_name_or_path", print)
    hub.fetch_model(tmp_path / "flux.safetensors", "flux", "pretrained_model_name_or_path", print)


def test_the_form_accepts_a_hub_id_that_is_not_fetched_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = validate_options({"pretrained_model_name_or_path": "owner/name"}, where="the test").options
    assert "pretrained_model_name_or_path" not in [problem.field for problem in check_files(options)]


def test_a_cached_model_of_another_kind_does_not_pass_for_the_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Path
) -> None:
    repo = tmp_path / "models--owner--chroma"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abcd", encoding="utf-8")
    (repo / "snapshots" / "0123abcd").mkdir(parents=True)
    shutil.copy(golden / "model_dev.safetensors", repo / "snapshots" / "0123abcd" / "flux1.safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    hub.fetch_model(Path("owner/chroma"), "flux", "pretrained_model_name_or_path", print)
    with pytest.raises(UserError, match="owner/chroma is not whole in the local Hugging Face cache"):
        hub.fetch_model(Path("owner/chroma"), "t5xxl", "t5xxl", print)
