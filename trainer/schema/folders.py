"""Where the program keeps what belongs to the user. The functions name folders; whoever writes there makes them."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Final, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

HOME_VARIABLE: Final = "FLUXGUI_HOME"
SETTINGS_FILE: Final = "settings.toml"


def data_home() -> Path:
    """The data folder: `$FLUXGUI_HOME`, else the place this system has for the data of a user's programs."""
    chosen = os.environ.get(HOME_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "FluxGUI"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "FluxGUI"
    shared = os.environ.get("XDG_DATA_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    return (Path(shared) if Path(shared).is_absolute() else Path.home() / ".local" / "share") / "fluxgui"


def settings_path() -> Path:
    """The user's settings, which `settings.py` describes."""
    return data_home() / SETTINGS_FILE


def _chosen(name: str, usual: str) -> Path:
    """The folder that the settings name, else the usual one in the data folder."""
    path = settings_path()
    with contextlib.suppress(OSError):
        chosen = _folders_in(path, path.stat().st_mtime_ns).get(name)
        if isinstance(chosen, str) and Path(chosen).is_absolute():
            return Path(chosen)
    return data_home() / usual


@lru_cache(maxsize=4)
def _folders_in(path: Path, _modified: int) -> dict[str, object]:
    """The table of folders; asked for once a second by a page that watches runs, read when the file changes."""
    try:
        table = cast("object", tomlkit.parse(path.read_text(encoding="utf-8")).unwrap().get("folders"))
    except (OSError, UnicodeDecodeError, TOMLKitError):
        return {}  # reading the settings says what is wrong
    return cast("dict[str, object]", table) if isinstance(table, dict) else {}


def runs_dir() -> Path:
    """One folder per run."""
    return _chosen("runs_dir", "runs")


def bin_dir() -> Path:
    """Where what is deleted on the page goes; emptied by the user alone."""
    return data_home() / "bin"


def demo_dir() -> Path:
    """The demo's small models and pictures."""
    return data_home() / "demo"


def models_dir() -> Path:
    """Model files that the page finds by itself."""
    return _chosen("models_dir", "models")


def datasets_dir() -> Path:
    """Pictures and captions that were dropped on the page."""
    return _chosen("datasets_dir", "datasets")


def user_presets_dir() -> Path:
    """The user's own presets, one TOML file each."""
    return data_home() / "presets"
