"""Where curves go besides the run's own events: TensorBoard and Weights & Biases, under the reference trainer's names."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, cast

from PIL import Image

from trainer.schema.base import Problem, UserError
from trainer.schema.optional_packages import is_installed, not_installed
from trainer.schema.options import SECRET_OPTIONS, Options
from trainer.schema.toml_table import read_table

DEFAULT_NAME: Final = "network_train"
_PATHS_LEFT_OUT: Final = frozenset(
    {
        "pretrained_model_name_or_path",
        "clip_l",
        "t5xxl",
        "ae",
        "tokenizer_cache_dir",
        "train_data_dir",
        "reg_data_dir",
        "conditioning_data_dir",
        "output_dir",
        "logging_dir",
        "run_dir",
    }
)
"""Paths say more about a machine than about a run."""


class Tracker(Protocol):
    """One place that curves are sent to. No error of it may end a training: it warns through what it was given."""

    def log(self, scalars: Mapping[str, float], *, place: int, step: int, epoch: int) -> None:
        """Values at `place` on their axis, which is `step` or, for those of an epoch, `epoch`."""
        ...

    def picture(self, path: Path, *, index: int, prompt: str, step: int, epoch: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard's files in `folder`; `config` is written beside the curves as hyperparameters."""

    def __init__(self, folder: Path, *, config: Mapping[str, object] | None = None, **settings: Any) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # noqa: PLC0415 - half a second that few runs need

        self._writer = SummaryWriter(str(folder), **settings)
        if config:
            plain = {
                name: value if isinstance(value, (bool, int, float, str)) else str(value)
                for name, value in config.items()
            }
            # In the run's own folder: a name of its own would look like another run.
            self._writer.add_hparams(plain, {}, run_name=".")

    def log(self, scalars: Mapping[str, float], *, place: int, step: int, epoch: int) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, place)

    def picture(self, path: Path, *, index: int, prompt: str, step: int, epoch: int) -> None:
        """None: the files of TensorBoard would grow by every picture, which lies on the disk already."""

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, through the package wandb. Raises `UserError` when none can be started."""

    def __init__(
        self,
        project: str,
        *,
        name: str | None,
        api_key: str | None,
        folder: Path | None,
        config: Mapping[str, object] | None,
        settings: Mapping[str, Any],
    ) -> None:
        if not is_installed("wandb"):
            raise not_installed("log_with wandb", "wandb", "log_with")
        self._wandb: Any = importlib.import_module("wandb")
        given: dict[str, Any] = {"project": project, "name": name, "config": dict(config or {}), **settings}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            given.setdefault("dir", str(folder))
        if api_key is not None:
            # Not through its login, which would write the key into a file.
            given["settings"] = self._wandb.Settings(api_key=api_key)
        try:
            self._run: Any = self._wandb.init(**given)
        except (self._wandb.errors.Error, OSError, TypeError, ValueError) as error:
            what = str(error)
            if api_key is not None:
                what = what.replace(api_key, "***")
            raise UserError(
                f"Weights & Biases cannot be used: {what}",
                "--log_with",
                "Log in with: wandb login, give --wandb_api_key, or set WANDB_MODE=offline.",
                field="log_with",
            ) from None

    def log(self, scalars: Mapping[str, float], *, place: int, step: int, epoch: int) -> None:
        self._run.log({**scalars, "global_step": step, "epoch": epoch})

    def picture(self, path: Path, *, index: int, prompt: str, step: int, epoch: int) -> None:
        with Image.open(path) as picture:
            image = self._wandb.Image(picture, caption=prompt)
        self._run.log({f"sample_{index}": image, "global_step": step, "epoch": epoch})

    def close(self) -> None:
        self._run.finish()


def start_trackers(options: Options) -> list[Tracker]:
    """What the options ask for; TensorBoard's folder is the one that the reference trainer would use."""
    wanted = options.log_with or ("tensorboard" if options.logging_dir is not None else None)
    settings = tracker_settings(options)
    config = logged_config(options) if options.log_config else None
    name = options.log_tracker_name or DEFAULT_NAME
    moment = time.strftime("%Y%m%d%H%M%S")
    folder = None if options.logging_dir is None else options.logging_dir / f"{options.log_prefix or ''}{moment}"
    trackers: list[Tracker] = []
    if wanted in ("wandb", "all"):
        trackers.append(
            Wandb(
                name,
                name=options.wandb_run_name,
                api_key=options.wandb_api_key,
                folder=folder,
                config=config,
                settings=settings.get("wandb", {}),
            )
        )
    if wanted in ("tensorboard", "all") and folder is not None:
        trackers.append(TensorBoard(folder / name, config=config, **settings.get("tensorboard", {})))
    return trackers


def check_trackers(options: Options) -> None:
    """Raises `UserError` for a missing package or a wrong `log_tracker_config`."""
    if options.log_with in ("wandb", "all") and not is_installed("wandb"):
        raise not_installed(f"log_with {options.log_with}", "wandb", "log_with")
    tracker_settings(options)


def tracker_settings(options: Options) -> dict[str, dict[str, Any]]:
    """The tables `[wandb]` and `[tensorboard]` of `log_tracker_config`: settings of wandb.init and of SummaryWriter.

    Raises `UserError` (exit code 2) for a file that cannot be read and for other tables.
    """
    path = options.log_tracker_config
    if path is None:
        return {}
    table = read_table(path, "tracker's configuration", "log_tracker_config")
    problems = [
        Problem(
            f"the tracker's configuration has {name}, which is not a table of a tracker",
            str(path),
            "Put wandb's settings below [wandb] and TensorBoard's below [tensorboard].",
            "log_tracker_config",
        )
        for name, value in table.items()
        if name not in ("wandb", "tensorboard") or not isinstance(value, dict)
    ]
    if problems:
        raise UserError.many(problems, exit_code=2)
    return cast("dict[str, dict[str, Any]]", table)


def logged_config(options: Options) -> dict[str, object]:
    """The options for a tracker, as plain values: without keys and tokens, and without paths."""
    values = cast("dict[str, object]", options.model_dump(mode="json"))
    return {name: value for name, value in values.items() if name not in SECRET_OPTIONS | _PATHS_LEFT_OUT}
