"""A LoRA's tensors apart from any file format: one adapter for each layer, and what fusing and cutting layers means.

R rank, I in features, O out features. An adapter adds alpha / R * up(down(x)) to its layer's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import torch
from torch import Tensor

_NOTHING: Final[Mapping[str, Tensor]] = {}


@dataclass(frozen=True)
class LayerTensors:
    """One layer's adapter: `down` (R, I) and `up` (O, R). `alpha` (0-d) None stands for alpha = R; `bias` (O) is added as it is.

    `magnitude` makes it a DoRA: the norms of the adapted weight's columns (1, I), or of its rows (O, 1).
    """

    down: Tensor
    up: Tensor
    alpha: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What up(down(x)) is multiplied with."""
        return 1.0 if self.alpha is None else float(self.alpha) / self.rank

    @property
    def has_row_magnitude(self) -> bool:
        """Whether it is a DoRA with a magnitude for each out feature, which can be cut with its layer."""
        return self.magnitude is not None and tuple(self.magnitude.shape) == (self.up.shape[0], 1)


@dataclass(frozen=True)
class LoraTensors:
    """Adapters by published name, and the query and key norms that a control LoRA replaces, by path in FLUX."""

    adapters: Mapping[str, LayerTensors]
    norms: Mapping[str, Tensor] = field(default_factory=lambda: _NOTHING)


def part_sizes(num_parts: int, in_features: int, out_features: int) -> list[int]:
    """Out features of each part of a fused Linear: three equal ones, or q, k, v as wide as the input and the MLP."""
    if num_parts == 4:
        return [in_features] * 3 + [out_features - 3 * in_features]
    return [out_features // num_parts] * num_parts


def matching_alpha(rank: int, like: Tensor) -> Tensor:
    """alpha = rank, in the weights' number type where that holds it exactly."""
    alpha = torch.tensor(float(rank), dtype=like.dtype if like.is_floating_point() else torch.float32)
    return alpha if float(alpha) == rank else torch.tensor(float(rank))


def _alpha_like(alpha: Tensor, value: float) -> Tensor:
    """`value` in the number type of `alpha` where that holds it exactly, else in float32."""
    wanted = torch.tensor(value, dtype=torch.float32)
    own = wanted.to(alpha.dtype)
    return own if float(own) == float(wanted) else wanted


# -------------------------------------------------------------------------------------------------------------- fusing


def fuse(parts: Sequence[LayerTensors | None], sizes: Sequence[int]) -> LayerTensors:
    """One adapter for a fused Linear from those of its parts; None for a part without one.

    Parts that share one `down` and one scale keep it and the rank, their `up` below one another. Others stand on the
    diagonal of a larger adapter, whose rank is the sum of theirs and whose scale is the first part's. At least one part
    must be there; `sizes` are the parts' out features. Raises `ValueError` when only some parts have a magnitude.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    magnitude = _fused_magnitude(parts)
    is_shared = all(torch.equal(part.down, first.down) and part.scale == first.scale for part in present)
    if is_shared:
        ups = [
            first.up.new_zeros(size, first.rank) if part is None else part.up
            for part, size in zip(parts, sizes, strict=True)
        ]
        return LayerTensors(first.down, torch.cat(ups), first.alpha, _fused_bias(parts, sizes), magnitude)
    rank = sum(part.rank for part in present)
    up = first.up.new_zeros(sum(sizes), rank)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            own = part.up if part.scale == first.scale else part.up * (part.scale / first.scale)
            up[row : row + size, column : column + part.rank] = own
            column += part.rank
        row += size
    alpha = None
    if first.alpha is not None:
        alpha = _alpha_like(first.alpha, first.scale * rank)
    return LayerTensors(torch.cat([part.down for part in present]), up, alpha, _fused_bias(parts, sizes), magnitude)


def _fused_magnitude(parts: Sequence[LayerTensors | None]) -> Tensor | None:
    """The rows' magnitudes below one another. What a part without one has depends on the model's own weight."""
    given = [None if part is None else part.magnitude for part in parts]
    found = [magnitude for magnitude in given if magnitude is not None]
    if found and len(found) < len(given):
        raise ValueError("only some parts have a magnitude")
    return torch.cat(found) if found else None


def _fused_bias(parts: Sequence[LayerTensors | None], sizes: Sequence[int]) -> Tensor | None:
    given = next((part.bias for part in parts if part is not None and part.bias is not None), None)
    if given is None:
        return None
    pieces = [
        given.new_zeros(size) if part is None or part.bias is None else part.bias
        for part, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(pieces)


# ------------------------------------------------------------------------------------------------------------- cutting


def cut(
    adapter: LayerTensors, sizes: Sequence[int], ranks: Sequence[int | None] | None = None
) -> list[LayerTensors | None]:
    """The adapters of a fused Linear's parts: the inverse of `fuse`, each with the strength of the whole.

    Where every column of `up` serves one part only, the parts get their own columns and rows of `down`; else each has
    all of `down`. A part on which the adapter does nothing, while it does something on another, gets None. `ranks` are
    the parts' ranks in the file that the adapter came from (None for a part that was not in it): followed as long as
    the weights still allow it, which makes reading and writing lose nothing even where weights are zero. A magnitude
    must be one of rows: the norms of columns run through all parts.
    """
    ups = list(adapter.up.split(list(sizes)))
    columns = _columns_from_ranks(ups, ranks) if ranks is not None else None
    if columns is None:
        columns = _own_columns(ups)
        if columns is not None and _have_equal_rows(adapter.down, columns):
            # Read back, such parts would be taken for parts of one shared `down`.
            columns = None
    if columns is None:
        is_idle = [not bool(up.any()) for up in ups]
        columns = [None if idle and not all(is_idle) else (0, adapter.rank) for idle in is_idle]
    biases: list[Tensor | None] = [None] * len(ups)
    magnitudes: list[Tensor | None] = [None] * len(ups)
    if adapter.bias is not None:
        biases = list(adapter.bias.split(list(sizes)))
    if adapter.magnitude is not None:
        magnitudes = list(adapter.magnitude.split(list(sizes)))
    if adapter.bias is not None or adapter.magnitude is not None:
        columns = [span or (0, adapter.rank) for span in columns]
    return [
        None if span is None else replace(_part(adapter, up, span), bias=bias, magnitude=magnitude)
        for up, span, bias, magnitude in zip(ups, columns, biases, magnitudes, strict=True)
    ]


_Columns: TypeAlias = "list[tuple[int, int] | None]"


def _part(adapter: LayerTensors, up: Tensor, span: tuple[int, int]) -> LayerTensors:
    start, stop = span
    alpha = adapter.alpha
    if alpha is not None and stop - start != adapter.rank:
        alpha = _alpha_like(alpha, float(alpha) / adapter.rank * (stop - start))
    down = adapter.down if stop - start == adapter.rank else adapter.down[start:stop].contiguous()
    return LayerTensors(down, up[:, start:stop].contiguous(), alpha)


def _columns_from_ranks(ups: Sequence[Tensor], ranks: Sequence[int | None]) -> _Columns | None:
    """The columns by the parts' known ranks, or None when the weights do not have that form (any more)."""
    rank = ups[0].shape[1]
    present = [number for number in ranks if number is not None]
    is_absent_idle = all(number is not None or not bool(up.any()) for up, number in zip(ups, ranks, strict=True))
    if not present or not is_absent_idle:
        return None
    if len(present) > 1 and sum(present) == rank:
        columns: _Columns = []
        start = 0
        for number in ranks:
            columns.append(None if number is None else (start, start + number))
            start += number or 0
        return columns if _is_diagonal(ups, columns) else None
    if all(number == rank for number in present):
        return [None if number is None else (0, rank) for number in ranks]
    return None


def _is_diagonal(ups: Sequence[Tensor], columns: _Columns) -> bool:
    for up, span in zip(ups, columns, strict=True):
        start, stop = span or (0, 0)
        if bool(up[:, :start].any()) or bool(up[:, stop:].any()):
            return False
    return True


def _own_columns(ups: Sequence[Tensor]) -> _Columns | None:
    """Each part's columns when no column serves two parts and they stand in the parts' order; else None."""
    rank = ups[0].shape[1]
    chunk = rank // len(ups)
    equal: _Columns = [(index * chunk, (index + 1) * chunk) for index in range(len(ups))]
    if chunk * len(ups) == rank and all(bool(up.any()) for up in ups) and _is_diagonal(ups, equal):
        return equal
    serves = torch.stack([(up != 0).any(dim=0) for up in ups])
    if bool((serves.sum(dim=0) != 1).any()):
        # A column that serves none could belong to either neighbour: shared `down` is right in any case.
        return None
    owners: list[int] = serves.int().argmax(dim=0).tolist()
    if owners != sorted(owners) or len(set(owners)) == 1:
        return None
    return [(owners.index(p), owners.index(p) + owners.count(p)) if p in owners else None for p in range(len(ups))]


def _have_equal_rows(down: Tensor, columns: _Columns) -> bool:
    rows = [down[span[0] : span[1]] for span in columns if span is not None]
    return all(torch.equal(own, rows[0]) for own in rows)


# --------------------------------------------------------------------------------------------------------------- alpha


def folds_exactly(adapter: LayerTensors) -> bool:
    """Whether `down` times the scale, divided by it again, is `down` to the last bit."""
    alpha = adapter.alpha
    return alpha is None or torch.equal(unfold_alpha(fold_alpha(adapter), alpha).down, adapter.down)


def fold_alpha(adapter: LayerTensors) -> LayerTensors:
    """The same adapter with alpha = R: the scale multiplied into `down`, computed in float32."""
    if adapter.scale == 1:
        return replace(adapter, alpha=None)
    down = (adapter.down.float() * adapter.scale).to(adapter.down.dtype)
    return replace(adapter, down=down, alpha=None)


def unfold_alpha(adapter: LayerTensors, alpha: Tensor) -> LayerTensors:
    """The inverse of `fold_alpha` for an adapter that had `alpha`."""
    scale = float(alpha) / adapter.rank
    if scale in (0, 1):
        return replace(adapter, alpha=alpha)
    return replace(adapter, down=(adapter.down.float() / scale).to(adapter.down.dtype), alpha=alpha)
