"""State folders: how they are called, written whole or not at all, found again, and which old ones go.

A folder holds `state.json` (position, seed, options, and everything that is no tensor), `network.safetensors`,
`optimizer.safetensors`, `random.safetensors`, and `train_state.json` with the two keys of kohya-ss/sd-scripts. Nothing
in it is pickled. Names are the reference's: X-step00000100-state, X-000010-state, X-state.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.schema.run_folder import numbered_entries
from trainer.train.checkpoint import CheckpointKind, checkpoint_name, explain_disk
from trainer.train.state_head import FORMAT, REFERENCE_FILE, STATE_FILE, damaged

_OS_ERROR: Final = re.compile(r"code: (\d+)")


def state_name(output_name: str | None, kind: CheckpointKind, number: int = 0) -> str:
    """The folder's name after step or epoch `number`, or at the end."""
    return checkpoint_name(output_name, kind, number).removesuffix(".safetensors") + "-state"


def run_state_name(step: int) -> str:
    """The name of a state that a run folder keeps by itself: step-000500."""
    return f"step-{step:06d}"


# ----------------------------------------------------------------------------------------------------------- writing


def write_state(
    path: Path,
    content: Mapping[str, object],
    tensors: Mapping[str, Mapping[str, Tensor]],
    reference: Mapping[str, int],
) -> None:
    """Makes the folder `path`, in which everything is on the disk before it has its name; one there is replaced.

    `tensors` are those of `PARTS`. Raises `UserError` when the disk refuses; nothing is left behind then, and what was
    there before is as it was.
    """
    num_bytes = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explain_disk(path, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path.parent, path.name)
        try:
            temporary.mkdir()
            for part, named in tensors.items():
                _write_tensors(temporary / f"{part}.safetensors", named)
            _write_json(temporary / REFERENCE_FILE, reference)
            _write_json(temporary / STATE_FILE, {"format": FORMAT, **content})
            _flush(temporary)
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush(path.parent)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library's own error for what the system refused; the number in it is the system's.
        code = _OS_ERROR.search(str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Waits until the folder's own entries are on the disk, where the system can say so."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    # A folder that is not empty cannot be replaced in one go; until the new one has the name, the old one exists.
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_unfinished(folder: Path, name: str) -> None:
    """What a killed process left of this very state; an old one whose successor never got the name gets it back."""
    for leftover in folder.glob(f".{glob.escape(name)}.????????.*"):
        if leftover.suffix == ".old" and not (folder / name).exists():
            leftover.rename(folder / name)
        elif leftover.suffix in (".tmp", ".old"):
            shutil.rmtree(leftover, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- reading


def read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part, on the host."""
    try:
        tensors = safetensors.torch.load_file(path / f"{part}.safetensors")
    except (SafetensorError, OSError) as error:
        raise damaged(path, f"{part}.safetensors cannot be read: {error}") from error
    # Copies: tensors inside a mapped file lie at any address, and the address decides about the last bit of a sum.
    return {name: tensor.clone() for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------------- retention


def remove_states(
    folder: Path, pattern: re.Pattern[str], *, up_to: int, keep: Path | None, warn: Callable[[str], None]
) -> None:
    """Removes states that match `pattern` and whose number is `up_to` or less, except `keep`.

    One that cannot be removed is a warning: the run goes on.
    """
    for number, path in numbered_entries(folder, pattern):
        if number > up_to or path == keep:
            continue
        try:
            # Under another name first: what is half removed must not look like a state.
            doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warn(f"the old state {path} could not be removed: {error.strerror or error}")
