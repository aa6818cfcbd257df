"""T5 in main memory as its file stores it; a block's weights are made for the time that the block computes.

An fp8 file would take twice its size as bf16, four times as fp32. Encoding on a CPU computes far longer than this
conversion takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from trainer.model.mapped_file import MappedFile
from trainer.model.weights import empty_t5xxl
from trainer.schema.base import UserError
from trainer.schema.checkpoint_header import Header, t5_params
from trainer.schema.key_plans import Piece, t5_plan
from trainer.schema.weight_files import read_weights

_NUMBERS_AT_ONCE: Final = 1 << 18
"""Of a weight, so many numbers are converted at once; 1 MB in float32."""


@dataclass(frozen=True)
class _Stored:
    """A weight's numbers (R, C) as in the file, and what multiplies them: (1, 1) or (R, 1) in float32, None for plain."""

    numbers: Tensor
    scale: Tensor | None

    def write_to(self, dense: Tensor) -> None:
        """Into `dense` (R, C), as the ordinary loading does it: scaled numbers are multiplied in float32, rounded once."""
        if self.scale is None:
            dense.copy_(self.numbers)
            return
        step = max(1, _NUMBERS_AT_ONCE // self.numbers.shape[-1])
        for first in range(0, len(dense), step):
            rows = slice(first, first + step)
            scale = self.scale if len(self.scale) == 1 else self.scale[rows]
            dense[rows] = self.numbers[rows].float().mul_(scale)


def load_t5xxl_as_stored(path: Path, dtype: torch.dtype) -> T5EncoderModel:
    """The T5 encoder that `path` names, in main memory, computing in `dtype`, for use without gradients.

    Equal to `load_t5xxl` bit by bit. Weights of the blocks stay as they are stored where that takes less memory than
    `dtype`; one after the other they are converted in one place that all blocks compute in. Raises `UserError` when the
    file is not a whole T5 encoder.
    """
    header = read_weights(path, "t5xxl")
    model = empty_t5xxl(t5_params(header))
    # One embedding under two names: both must go on being the same parameter.
    model.encoder.embed_tokens = model.shared
    with ExitStack() as stack:
        try:
            files = {file: stack.enter_context(closing(MappedFile(file))) for file in header.files}
        except OSError as error:
            raise UserError(
                f"this file cannot be read ({error.strerror or error})", str(header.path), "Check the disk."
            ) from error
        kept: dict[str, _Stored] = {}
        rooms: dict[str, Tensor] = {}
        for planned in t5_plan(header):
            (piece,) = planned.pieces
            stored = _read(files, header, piece)
            owner, _, name = planned.target.rpartition(".")
            is_kept = planned.target.startswith("encoder.block.") and stored.numbers.element_size() < dtype.itemsize
            if is_kept and isinstance(model.get_submodule(owner), nn.Linear):
                kept[owner] = stored
                # One room for the same layer of all blocks. Rooms that come and go would leave gaps between what lasts.
                value = rooms.setdefault(_path_in_block(owner), torch.empty(planned.shape, dtype=dtype))
            else:
                value = torch.empty(planned.shape, dtype=dtype)
                stored.write_to(value)
            setattr(model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    for index, block in enumerate(model.encoder.block):
        prefix = f"encoder.block.{index}."
        own = [(rooms[_path_in_block(path)], stored) for path, stored in kept.items() if path.startswith(prefix)]
        block.register_forward_pre_hook(_filling(own))
    return model.eval()


def _path_in_block(path: str) -> str:
    return path.split(".", 3)[3]


def _filling(weights: Sequence[tuple[Tensor, _Stored]]) -> Callable[..., None]:
    def fill(*_: object) -> None:
        for room, stored in weights:
            stored.write_to(room)

    return fill


def _read(files: Mapping[Path, MappedFile], header: Header, piece: Piece) -> _Stored:
    file = files[header.file_of(piece.source)]
    if piece.scale is None:
        return _Stored(file.read(piece.info, rows=piece.rows), None)
    scale = files[header.file_of(piece.scale.name)].read(header.tensors[piece.scale.name])
    return _Stored(file.read(piece.info, piece.scale.read_as, piece.rows), scale.float().reshape(-1, 1))
