"""What `blocks_to_swap` counts: n stands for n // 2 double and 2 * (n - n // 2) single blocks, the rule of sd-scripts."""

from __future__ import annotations

from typing import Literal


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
