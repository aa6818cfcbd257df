"""LoRA files: how they are called, written whole or not at all, and which old one a new one supersedes.

Names, retention and the hashes are those of kohya-ss/sd-scripts (`library/train_util.py`), so that other tools find
what they know.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Callable, Collection, Generator, Mapping
from pathlib import Path
from typing import Final, Literal, cast

import safetensors.torch
import torch
from torch import Tensor

from trainer.schema.base import UserError
from trainer.schema.run_folder import numbered_entries, write_atomic
from trainer.train.model_hashes import tensor_hashes

CheckpointKind = Literal["step", "epoch", "final"]

_FALLBACK_NAMES: Final[Mapping[CheckpointKind, str]] = {"step": "at", "epoch": "epoch", "final": "last"}
_SAVE_DTYPES: Final = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """The number format that a LoRA is saved in; None leaves it as it was trained."""
    return None if save_precision is None else _SAVE_DTYPES[save_precision]


def checkpoint_name(output_name: str | None, kind: CheckpointKind, number: int = 0) -> str:
    """The file's name after step or epoch `number`, or at the end: X-step00000100, X-000010, X, with .safetensors."""
    stem = output_name or _FALLBACK_NAMES[kind]
    ending = {"step": f"-step{number:08d}", "epoch": f"-{number:06d}", "final": ""}[kind]
    return f"{stem}{ending}.safetensors"


def save_lora(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes `state` and `metadata`, with the two `sshs_` hashes added, to `path`; a file there is replaced.

    The file appears whole or not at all. Raises `UserError` when the disk is full or does not take the file; nothing is
    left behind then.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    hashed = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    serialised = safetensors.torch.save(tensors, metadata=hashed or None)
    hashes = tensor_hashes(serialised)
    write_file(path, _with_metadata(serialised, {**metadata, **hashes}))


def _with_metadata(serialised: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same tensors under a header with `metadata`: cheaper than serialising them once more."""
    data_start = _LENGTH_BYTES + int.from_bytes(serialised[:_LENGTH_BYTES], "little")
    header = cast("dict[str, object]", json.loads(serialised[_LENGTH_BYTES:data_start]))
    header = {"__metadata__": dict(metadata), **{key: value for key, value in header.items() if key != "__metadata__"}}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join((len(text).to_bytes(_LENGTH_BYTES, "little"), text, memoryview(serialised)[data_start:]))


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` through a temporary file beside it, making the folder when it is missing.

    Raises `UserError` (exit code 3) for whatever the disk refuses.
    """
    with explain_disk(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)


@contextlib.contextmanager
def explain_disk(path: Path, num_bytes: int) -> Generator[None]:
    """Turns what the disk refuses into a `UserError` (exit code 3) about `path`, which needs `num_bytes`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError(
                f"the disk is full: {path.name} needs {num_bytes / 1e6:.1f} MB",
                str(path.parent),
                "Free some space, or choose another folder. Files saved before are still good.",
                field="output_dir",
            ) from error
        reason = error.strerror or str(error)
        raise UserError(
            f"{path.name} cannot be written: {reason}",
            str(path.parent),
            "Check that the folder exists and that you may write to it.",
            field="output_dir",
        ) from error


def superseded_number(kind: CheckpointKind, number: int, *, every: int | None, keep_last: int | None) -> int | None:
    """The step or epoch whose file is removed after that of `number` is saved, by the reference's rule; None for none.

    `every` is `save_every_n_...`, `keep_last` is `save_last_n_...`: epochs and steps back, not a count of files.
    """
    if not every or not keep_last or kind == "final":
        return None
    if kind == "epoch":
        old = number - every * keep_last
    else:
        old = number - keep_last - 1
        old -= old % every
    return old if old >= 0 else None


def remove_superseded(
    folder: Path,
    output_name: str | None,
    kind: CheckpointKind,
    number: int,
    *,
    every: int | None,
    keep_last: int | None,
    warn: Callable[[str], None],
    spare: Collection[int] = (),
) -> list[Path]:
    """Removes the files of this kind that the one of `number` supersedes, and gives their paths.

    The reference removes one computed name, so that files stay behind when the settings changed or a run was stopped in
    between; here everything that is as old goes too. `spare` are the numbers of files that somebody asked for. A file
    that cannot be removed, for example because another program has it open, is a warning: the run goes on.
    """
    old = superseded_number(kind, number, every=every, keep_last=keep_last)
    if old is None:
        return []
    removed: list[Path] = []
    for found, path in numbered_entries(folder, numbered_pattern(output_name, kind, ".safetensors")):
        if found > old or found in spare:
            continue
        try:
            path.unlink()
            removed.append(path)
        except OSError as error:
            warn(f"the old checkpoint {path} could not be removed: {error.strerror or error}")
    return removed


def numbered_pattern(output_name: str | None, kind: CheckpointKind, ending: str) -> re.Pattern[str]:
    """Matches the names of the step or epoch files (or states) of a run; the number is its one group."""
    stem = re.escape(output_name or _FALLBACK_NAMES[kind])
    number = {"step": r"-step(\d{8,})", "epoch": r"-(\d{6,})", "final": "()"}[kind]
    return re.compile(f"{stem}{number}{re.escape(ending)}")
