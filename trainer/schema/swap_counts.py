"""What `blocks_to_swap` counts: n stands for n // 2 double and 2 * (n - n // 2) single blocks, the rule of sd-scripts."""

from __future__ import annotations

from typing import Final, Literal

from trainer.schema.chroma_header import TransformerParams
from trainer.schema.storage import NF4_BLOCK, NF4_SCALE_BYTES, SCALE_BYTES, Shape, Storage, block_shapes

ALIGNMENT: Final = 256
"""Bytes; where each tensor begins in a slab and in a slot."""


def chosen_swap(blocks_to_swap: int | Literal["auto"] | None) -> int:
    """The option's number; 0 for `auto`, which whoever knows the card replaces by a number."""
    return blocks_to_swap if isinstance(blocks_to_swap, int) else 0


def split_swap(blocks_to_swap: int) -> tuple[int, int]:
    """How many double and single blocks `blocks_to_swap` stands for: 18 -> (9, 18)."""
    num_double = blocks_to_swap // 2
    return num_double, 2 * (blocks_to_swap - num_double)


def max_blocks_to_swap(depth: int, depth_single_blocks: int) -> int:
    """The largest count that a model of this depth has the blocks for: (19, 38) -> 38.

    The reference trainer stops at 35, as it keeps two blocks of each kind resident; the ring needs none.
    """
    count = 0
    while split_swap(count + 1)[0] <= depth and split_swap(count + 1)[1] <= depth_single_blocks:
        count += 1
    return count


def slab_bytes(
    flux: TransformerParams, storage: Storage, value_bytes: int, *, with_modulation: bool = True
) -> tuple[int, int]:
    """What the Linear weights and scales of a double and of a single block take in a slab or a slot."""

    def tensors(shape: Shape) -> tuple[int, ...]:
        count = shape[0] * shape[1]
        if storage == "compute":
            return (count * value_bytes,)
        if storage == "nf4":
            return -(-count // 2), NF4_SCALE_BYTES * -(-count // NF4_BLOCK)
        return count, SCALE_BYTES * shape[0]

    double, single = (
        sum(aligned(size) for shape in stored for size in tensors(shape))
        + sum(aligned(rows * columns * value_bytes) for rows, columns in kept)
        for stored, kept in block_shapes(flux, storage, with_modulation=with_modulation)
    )
    return double, single


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
