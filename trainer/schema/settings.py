"""What the user set for the whole program: one TOML file in the data folder, and the token for the hub beside it.

Both processes read it: the page for its folders, language and look, the worker for what to do when a run ends. The file is
written by the page alone. The token has a file of its own, which only its owner may read, and is never part of a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, cast
from urllib.parse import urlsplit

import tomlkit
from tomlkit.exceptions import TOMLKitError

from trainer.schema.base import Problem, UserError
from trainer.schema.folders import (
    data_home,
    datasets_dir,
    models_dir,
    runs_dir,
    settings_path,
)
from trainer.schema.run_folder import write_atomic

logger = logging.getLogger("trainer")

Theme = Literal["system", "light", "dark"]
THEMES: Final = ("system", "light", "dark")
TOKEN_FILE: Final = "hub_token"
TOKEN_VARIABLE: Final = "HF_TOKEN"
_EXIT_OPTIONS: Final = 2


@dataclass(frozen=True)
class Settings:
    """All settings at their defaults. A folder of None is the one in the data folder.

    `notify_command` are the words of a program that is started when a run ends, `notify_webhook` an address that is
    sent the same as JSON. `start_preset` is what a new form holds, `model_paths` are the model files that were used last, by option.
    """

    language: str | None = None
    theme: Theme = "system"
    start_preset: str | None = None
    models_dir: Path | None = None
    datasets_dir: Path | None = None
    runs_dir: Path | None = None
    allowed_dirs: tuple[Path, ...] = ()
    notify_browser: bool = False
    notify_command: tuple[str, ...] = ()
    notify_webhook: str | None = None
    model_paths: Mapping[str, str] = field(default_factory=dict[str, str])


_TABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "page": ("language", "theme", "start_preset"),
    "folders": ("models_dir", "datasets_dir", "runs_dir", "allowed_dirs"),
    "notifications": ("notify_browser", "notify_command", "notify_webhook"),
    "models": ("model_paths",),
}


def read_settings() -> Settings:
    """The settings. What cannot be read in the file is at its default and named in the log; never raises."""
    path = settings_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read (%s): the defaults are used", path, error)
        return Settings()
    try:
        parsed = cast("dict[str, object]", tomlkit.parse(text).unwrap())
    except TOMLKitError as error:
        logger.warning("%s is no TOML (%s): the defaults are used", path, error)
        return Settings()
    found: dict[str, Any] = {}
    for table, names in _TABLES.items():
        content = parsed.get(table)
        values = cast("dict[str, object]", content) if isinstance(content, dict) else {}
        for name in names:
            if name in values:
                value = _read(name, values[name])
                if value is None:
                    logger.warning("%s: %s is left out, its value cannot be used", path, name)
                else:
                    found[name] = value
    return Settings(**found)


def _read(name: str, value: object) -> object:
    """A value of the file as its type, None when it is none."""
    match name:
        case "language" | "notify_webhook" | "start_preset":
            return value if isinstance(value, str) and value else None
        case "theme":
            return value if value in THEMES else None
        case "models_dir" | "datasets_dir" | "runs_dir":
            return Path(value) if isinstance(value, str) and Path(value).is_absolute() else None
        case "allowed_dirs":
            return tuple(Path(entry) for entry in _texts(value) if Path(entry).is_absolute())
        case "notify_command":
            return tuple(_texts(value))
        case "notify_browser":
            return value if isinstance(value, bool) else None
        case _:
            entries = cast("dict[str, object]", value) if isinstance(value, dict) else {}
            return {key: entry for key, entry in entries.items() if isinstance(entry, str)}


def _texts(value: object) -> list[str]:
    entries = cast("list[object]", value) if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, str)]


def save_settings(settings: Settings) -> None:
    """Write the file. Raises `UserError` (exit code 2) with everything that is wrong with the settings, and `OSError`."""
    problems = [
        Problem(f"{path} is no whole path", hint="Give the folder from its root.", field=name)
        for name in ("models_dir", "datasets_dir", "runs_dir")
        if (path := cast("Path | None", getattr(settings, name))) is not None and not path.is_absolute()
    ]
    problems += [
        Problem(f"{path} is no folder on this machine", field="allowed_dirs")
        for path in settings.allowed_dirs
        if not path.is_dir()
    ]
    if settings.notify_webhook is not None and urlsplit(settings.notify_webhook).scheme not in ("http", "https"):
        problems.append(Problem("the webhook is no address", hint="It begins with https://", field="notify_webhook"))
    if problems:
        raise UserError.many(problems, exit_code=_EXIT_OPTIONS)
    document = tomlkit.document()
    defaults = Settings()
    for table, names in _TABLES.items():
        chosen = {
            name: _written(getattr(settings, name))
            for name in names
            if getattr(settings, name) != getattr(defaults, name)
        }
        if chosen:
            document.add(table, tomlkit.item(chosen))
    path = settings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A webhook's address is a key to somebody's channel.
    write_atomic(path, tomlkit.dumps(document))
    _keep_private(path)


def change_settings(**changes: Any) -> Settings:
    """The settings with some of them changed and saved. Raises as `save_settings`."""
    unknown = set(changes) - {each.name for each in fields(Settings)}
    if unknown:
        raise ValueError(f"there are no settings {sorted(unknown)}")
    settings = replace(read_settings(), **changes)
    save_settings(settings)
    return settings


def _written(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_written(entry) for entry in cast("tuple[object, ...]", value)]
    return dict(cast("Mapping[str, object]", value)) if isinstance(value, Mapping) else value


def _keep_private(path: Path) -> None:
    if sys.platform != "win32":  # there, the user's own folder is private already
        with contextlib.suppress(OSError):
            path.chmod(0o600)


# ------------------------------------------------------------------------------------------------------------- token


def save_hub_token(token: str) -> None:
    """Keep the token where only its owner can read it; an empty one is forgotten. Raises `UserError` for what is none."""
    path = data_home() / TOKEN_FILE
    token = token.strip()
    if not token:
        path.unlink(missing_ok=True)
        return
    if not token.isascii() or any(letter.isspace() for letter in token) or len(token) > 500:
        raise UserError("this is no token", hint="A token of the hub is one word, such as hf_...")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{TOKEN_FILE}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    # Private from its first byte on, not only afterwards.
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(token)
    temporary.replace(path)


def token_of_environment() -> str | None:
    return os.environ.get(TOKEN_VARIABLE, "").strip() or None


def hub_token() -> str | None:
    """The token: that of the environment, else the saved one."""
    token = token_of_environment()
    if token:
        return token
    try:
        return (data_home() / TOKEN_FILE).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def has_saved_token() -> bool:
    return (data_home() / TOKEN_FILE).is_file()


def with_token(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that may ask the hub: with the token, where there is one."""
    token = hub_token()
    return {**environment, **({TOKEN_VARIABLE: token} if token else {})}


# ----------------------------------------------------------------------------------------------------------- folders


def allowed_dirs() -> list[Path]:
    """The folders that the page may show files of: the program's own and those the user added."""
    found = [data_home(), models_dir(), datasets_dir(), runs_dir(), *read_settings().allowed_dirs]
    return list(dict.fromkeys(found))


def is_allowed(path: Path) -> bool:
    """Whether `path`, with every link followed, lies in one of the allowed folders."""
    try:
        real = path.resolve()
        return any(real.is_relative_to(folder.resolve()) for folder in allowed_dirs())
    except (OSError, RuntimeError, ValueError):
        return False
