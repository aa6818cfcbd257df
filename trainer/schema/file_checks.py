"""Whether the files and folders that the options name are there and are what they are given as. Nothing is loaded."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from trainer.schema.base import Problem, UserError
from trainer.schema.hub_cache import hub_id
from trainer.schema.model_check import check_kind
from trainer.schema.model_kinds import ModelKind
from trainer.schema.options import Options
from trainer.schema.safetensors_header import Header, read_header
from trainer.schema.weight_files import read_weights

_MODELS: Final[tuple[tuple[str, ModelKind, str], ...]] = (
    ("clip_l", "clip_l", "the CLIP-L text encoder"),
    ("t5xxl", "t5xxl", "the T5-XXL text encoder"),
    ("ae", "autoencoder", "the autoencoder"),
)
MODEL_KINDS: Final[Mapping[str, ModelKind]] = {name: kind for name, kind, _ in _MODELS}
"""The kind of model that each option beside the transformer's takes."""


def needed_models(options: Options) -> tuple[tuple[str, ModelKind, str], ...]:
    """Option, kind and noun of every model that training needs."""
    path = "pretrained_model_name_or_path"
    if options.model_type == "chroma":
        return (path, "chroma", "the Chroma model"), *(entry for entry in _MODELS if entry[0] != "clip_l")
    return (path, "flux", "the FLUX.1 model"), *_MODELS


def check_network_files(options: Options) -> list[Problem]:
    """What is wrong with the LoRA files that are started from or merged before."""
    problems: list[Problem] = []
    if options.network_weights is not None and not _is_oft(options.network_weights):
        problems += _model_problems(options.network_weights, "lora", "network_weights", read=_read_one_file)
    for path in options.base_weights or ():
        if not _is_oft(path):
            problems += _model_problems(path, "lora", "base_weights", read=_read_one_file)
    return problems


def check_files(options: Options) -> list[Problem]:
    """Everything that is wrong with the files and folders, each with the option that names it. Never raises.

    Model files are known by their headers; a hub id that is not on this machine yet is left to the start of training. The output folder is tried with a temporary file in it, or in the nearest
    parent that exists; nothing stays behind.
    """
    problems: list[Problem] = []
    for name, kind, noun in needed_models(options):
        path: Path | None = getattr(options, name)
        if path is None:
            problems.append(_not_given(name, noun))
        else:
            problems += _model_problems(path, kind, name)
    problems += check_network_files(options)
    problems += _dataset_problems(options)
    if options.sample_prompts is not None:
        problems += _file_problems(options.sample_prompts, "sample_prompts")
    if options.output_dir is None:
        problems.append(_not_given("output_dir", "the folder for the LoRA"))
    for name in ("output_dir", "logging_dir"):
        folder: Path | None = getattr(options, name)
        if folder is not None:
            problems += _writing_problems(folder, name)
    return problems


def no_dataset(options: Options) -> Problem | None:
    """The problem that no pictures are given, if so."""
    if any(path is not None for path in (options.dataset_config, options.train_data_dir, options.in_json)):
        return None
    hint = "Give a dataset file, or --train_data_dir with folders named like 10_mycat."
    return Problem("no pictures are given", "--dataset_config", hint, "dataset_config")


def missing_folder(path: Path, field: str) -> Problem:
    """The problem with a folder of pictures that is not there, or is a file."""
    with contextlib.suppress(OSError, ValueError):
        if path.exists():
            return Problem("this is a file, not a folder", str(path), f"--{field} takes a folder.", field)
    return Problem("this folder does not exist", str(path), f"Check --{field} for a typing error.", field)


def _not_given(name: str, noun: str) -> Problem:
    return Problem(f"{noun} is not given", f"--{name}", f"Add --{name}=...", name)


def _read_one_file(path: Path, _kind: ModelKind) -> Header:
    """A LoRA is one file, never a folder or a hub id."""
    return read_header(path)


def _model_problems(
    path: Path, kind: ModelKind, name: str, *, read: Callable[[Path, ModelKind], Header] = read_weights
) -> Iterator[Problem]:
    try:
        problem = check_kind(read(path, kind), kind, name)
    except UserError as error:
        if read is read_weights and hub_id(path) is not None:
            return  # It is downloaded when training starts, and checked then.
        for found in error.problems:
            hint = f"{found.hint or ''} It is given as --{name}.".strip()
            yield Problem(found.what, found.where, hint, name)
        return
    except (OSError, ValueError) as error:
        yield Problem(f"this file cannot be read ({error})", str(path), f"It is given as --{name}.", name)
        return
    if problem is not None:
        yield problem


def _is_oft(path: Path) -> bool:
    with contextlib.suppress(UserError, OSError, ValueError):
        return any(name.startswith("oft_unet_") for name in read_header(path).tensors)
    return False


def _dataset_problems(options: Options) -> Iterator[Problem]:
    missing = no_dataset(options)
    if missing is not None:
        yield missing
    elif options.dataset_config is not None:
        yield from _file_problems(options.dataset_config, "dataset_config")
    else:
        if options.in_json is not None:
            yield from _file_problems(options.in_json, "in_json")
        names = ("train_data_dir",) if options.in_json is not None else ("train_data_dir", "reg_data_dir")
        for name in names:
            folder: Path | None = getattr(options, name)
            if folder is not None and not _is_dir(folder):
                yield missing_folder(folder, name)


def _file_problems(path: Path, name: str) -> Iterator[Problem]:
    hint = f"Check --{name} for a typing error."
    try:
        if path.is_dir():
            yield Problem("this is a folder, not a file", str(path), f"--{name} takes a file.", name)
        elif not path.exists():
            yield Problem("this file does not exist", str(path), hint, name)
        else:
            with path.open("rb") as file:
                file.read(1)
    except (OSError, ValueError) as error:
        yield Problem(f"this file cannot be read ({_reason(error)})", str(path), hint, name)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _writing_problems(folder: Path, name: str) -> Iterator[Problem]:
    place = f"--{name}={folder}"
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # Raises for a name that the system does not allow, where exists() would only say no.
        parent = folder.absolute()
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            what = f"the folder cannot be made: {parent} is a file" if parent != folder.absolute() else "this is a file"
            yield Problem(what, place, "Give a folder.", name)
            return
        with tempfile.TemporaryFile(dir=parent):
            pass
    except (OSError, ValueError) as error:
        hint = "Check its permissions and the free space, or give another folder."
        yield Problem(f"this folder cannot be written to ({_reason(error)})", place, hint, name)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
