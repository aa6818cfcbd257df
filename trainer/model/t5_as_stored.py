"""T5 in main memory as its file stores it; a block's weights are made for the time that the block computes.

An fp8 file would take twice its size as bf16, four times as fp32. Encoding on a CPU computes far longer than this
conversion takes.
"""

from __future__ import annotations

from collections.abc import Mapping
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

_NUMBERS_AT_ONCE: Final = 1 << 22


@dataclass(frozen=True)
class _Stored:
    """A weight's numbers (R, C) as in the file, and what multiplies them: (1, 1) or (R, 1) in float32, None for plain."""

    numbers: Tensor
    scale: Tensor | None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As the ordinary loading makes it: scaled numbers are multiplied in float32 and rounded once."""
        if self.scale is None:
            return self.numbers.to(dtype)
        dense = torch.empty(self.numbers.shape, dtype=dtype)
        step = max(1, _NUMBERS_AT_ONCE // self.numbers.shape[-1])
        for first in range(0, len(dense), step):
            rows = slice(first, first + step)
            scale = self.scale if len(self.scale) == 1 else self.scale[rows]
            dense[rows] = self.numbers[rows].float().mul_(scale)
        return dense


def load_t5xxl_as_stored(path: Path, dtype: torch.dtype) -> T5EncoderModel:
    """The T5 encoder that `path` names, in main memory, computing in `dtype`, for use without gradients.

    Equal to `load_t5xxl` bit by bit. Weights of the blocks stay as they are stored where that takes less memory than
    `dtype`. Raises `UserError` when the file is not a whole T5 encoder.
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
        for planned in t5_plan(header):
            (piece,) = planned.pieces
            stored = _read(files, header, piece)
            owner, _, name = planned.target.rpartition(".")
            is_kept = planned.target.startswith("encoder.block.") and stored.numbers.element_size() < dtype.itemsize
            if is_kept and isinstance(model.get_submodule(owner), nn.Linear):
                kept[owner] = stored
                value = torch.empty(0, dtype=dtype)
            else:
                value = stored.dense(dtype)
            setattr(model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    for index, block in enumerate(model.encoder.block):
        prefix = f"encoder.block.{index}."
        own = {path.removeprefix(prefix): stored for path, stored in kept.items() if path.startswith(prefix)}
        _make_while_used(block, own, dtype)
    return model.eval()


def _make_while_used(block: nn.Module, stored: Mapping[str, _Stored], dtype: torch.dtype) -> None:
    """Fills the Linears of `block` before its forward pass and empties them after it."""

    def fill(*_: object) -> None:
        for path, weight in stored.items():
            block.get_submodule(path).weight = nn.Parameter(weight.dense(dtype), requires_grad=False)

    def empty(*_: object) -> None:
        for path in stored:
            block.get_submodule(path).weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    if stored:
        block.register_forward_pre_hook(fill)
        block.register_forward_hook(empty, always_call=True)


def _read(files: Mapping[Path, MappedFile], header: Header, piece: Piece) -> _Stored:
    file = files[header.file_of(piece.source)]
    if piece.scale is None:
        return _Stored(file.read(piece.info, rows=piece.rows), None)
    scale = files[header.file_of(piece.scale.name)].read(header.tensors[piece.scale.name])
    return _Stored(file.read(piece.info, piece.scale.read_as, piece.rows), scale.float().reshape(-1, 1))
