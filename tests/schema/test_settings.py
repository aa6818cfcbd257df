"""Settings come back as they were saved; a broken file harms nothing; the token is private."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from trainer.schema.base import UserError
from trainer.schema.folders import data_home, datasets_dir, models_dir, runs_dir, settings_path
from trainer.schema.settings import (
    Settings,
    change_settings,
    hub_token,
    is_allowed,
    read_settings,
    save_hub_token,
    save_settings,
    with_token,
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_settings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    assert read_settings() == Settings()
    settings = Settings(
        language="zh",
        theme="dark",
        start_preset="style",
        models_dir=tmp_path / "models",
        datasets_dir=tmp_path / "data",
        runs_dir=tmp_path / "runs",
        allowed_dirs=(tmp_path,),
        notify_browser=True,
        notify_command=("notify-send", 'a "b" c'),
        notify_webhook="https://example.org/hook?key=1",
        model_paths={"ae": "/models/ae.safetensors"},
    )
    save_settings(settings)
    assert read_settings() == settings
    assert (models_dir(), datasets_dir(), runs_dir()) == (tmp_path / "models", tmp_path / "data", tmp_path / "runs")
    assert change_settings(theme="light", models_dir=None).theme == "light"
    assert models_dir() == data_home() / "models"


def test_a_broken_file_leaves_the_defaults() -> None:
    settings_path().parent.mkdir(parents=True)
    settings_path().write_text("theme = [", encoding="utf-8")
    assert read_settings() == Settings()
    assert models_dir() == data_home() / "models"
    settings_path().write_text(
        '[page]\ntheme = "pink"\nlanguage = "zh"\n[folders]\nruns_dir = "relative"', encoding="utf-8"
    )
    assert read_settings() == Settings(language="zh")
    assert runs_dir() == data_home() / "runs"


def test_what_cannot_be_used_is_refused_all_at_once(tmp_path: Path) -> None:
    wrong = Settings(models_dir=Path("models"), allowed_dirs=(tmp_path / "gone",), notify_webhook="file:///etc/passwd")
    with pytest.raises(UserError) as raised:
        save_settings(wrong)
    assert [problem.field for problem in raised.value.problems] == ["models_dir", "allowed_dirs", "notify_webhook"]
    assert not settings_path().exists()


def test_the_token_is_private_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_token() is None
    assert with_token({"A": "b"}) == {"A": "b"}
    save_hub_token(" hf_abc \n")
    path = data_home() / "hub_token"
    assert hub_token() == "hf_abc"
    assert with_token({})["HF_TOKEN"] == "hf_abc"
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert hub_token() == "hf_other"
    for text in ("two words", "ümlaut"):
        with pytest.raises(UserError, match="no token"):
            save_hub_token(text)
    save_hub_token("")
    assert not path.exists()


def test_only_allowed_folders_are_shown_and_links_are_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside, models_dir()):
        folder.mkdir(parents=True)
    (outside / "secret.safetensors").touch()
    (models_dir() / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (models_dir() / "model.safetensors").touch()
    assert is_allowed(models_dir() / "model.safetensors")
    assert not is_allowed(models_dir() / "link.safetensors")
    assert not is_allowed(models_dir() / ".." / ".." / "outside" / "secret.safetensors")
    assert not is_allowed(inside / "x")
    change_settings(allowed_dirs=(outside,))
    assert is_allowed(models_dir() / "link.safetensors")
