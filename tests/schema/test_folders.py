"""Where the program keeps the user's data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.schema.folders import data_home, datasets_dir, demo_dir, models_dir, runs_dir, user_presets_dir


def test_the_variable_decides_where_the_data_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXGUI_HOME", str(tmp_path / "here"))
    assert data_home() == tmp_path / "here"
    names = [path.relative_to(data_home()).as_posix() for path in (runs_dir(), demo_dir(), models_dir())]
    assert names == ["runs", "demo", "models"]
    assert (datasets_dir().name, user_presets_dir().name) == ("datasets", "presets")
    assert not data_home().exists(), "naming a folder must not make it"


def test_a_relative_or_home_path_in_the_variable_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUXGUI_HOME", "data")
    assert data_home() == tmp_path / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("FLUXGUI_HOME", "~/flux")
    assert data_home() == tmp_path / "flux"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG folders are for Linux and BSD")
def test_without_the_variable_the_xdg_data_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUXGUI_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert data_home() == tmp_path / "xdg" / "fluxgui"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_DATA_HOME", ignored)
        assert data_home() == tmp_path / ".local" / "share" / "fluxgui"
