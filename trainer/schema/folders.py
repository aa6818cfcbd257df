"""Where the program keeps what belongs to the user. The functions name folders; whoever writes there makes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

HOME_VARIABLE: Final = "FLUXGUI_HOME"


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


def runs_dir() -> Path:
    """One folder per run."""
    return data_home() / "runs"


def bin_dir() -> Path:
    """Where what is deleted on the page goes; emptied by the user alone."""
    return data_home() / "bin"


def demo_dir() -> Path:
    """The demo's small models and pictures."""
    return data_home() / "demo"


def models_dir() -> Path:
    """Model files that the page finds by itself."""
    return data_home() / "models"


def datasets_dir() -> Path:
    """Pictures and captions that were dropped on the page."""
    return data_home() / "datasets"


def user_presets_dir() -> Path:
    """The user's own presets, one TOML file each."""
    return data_home() / "presets"
