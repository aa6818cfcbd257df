"""Block swap: some blocks' weights wait in main memory and visit the device when their turn comes.

Which block must be where, and when; how it gets there is the mover's business. Swapped blocks are spread evenly among
those that stay, so that every copy has work to hide behind. They take turns in two slots: block number i of the
swapped ones always uses slot i mod 2.

    forward    before block i: it must be there; after it: its slot takes i + 2
    backward   before block i: it must be there; i + 1 is done, so its slot takes i - 1

Thus the last two are in place when backward begins, the first two when it ends, which is where the next forward pass
begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.offload.mover import Mover
from trainer.schema.base import UserError
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.swap_counts import max_blocks_to_swap, split_swap

NUM_SLOTS = 2


def spread(count: int, num_blocks: int) -> list[int]:
    """`count` of `num_blocks` positions, evenly spread."""
    return [(2 * turn + 1) * num_blocks // (2 * count) for turn in range(count)]


def swapped_blocks(depth: int, depth_single_blocks: int, blocks_to_swap: int) -> tuple[list[int], list[int]]:
    """Indices of the double and of the single blocks that are swapped.

    Raises `UserError` (exit code 2) that names the largest count when the model has too few blocks.
    """
    largest = max_blocks_to_swap(depth, depth_single_blocks)
    if blocks_to_swap > largest:
        raise UserError(
            f"blocks_to_swap is {blocks_to_swap}, but this model has {depth} double and {depth_single_blocks} single blocks",
            "--blocks_to_swap",
            f"The largest allowed is {largest}.",
            field="blocks_to_swap",
            exit_code=2,
        )
    num_double, num_single = split_swap(blocks_to_swap)
    return spread(num_double, depth), spread(num_single, depth_single_blocks)


def swapped_prefixes(params: TransformerParams, blocks_to_swap: int) -> tuple[str, ...]:
    """State-dict prefixes of the blocks that are swapped, such as `double_blocks.3.`: what to load into main memory."""
    double, single = swapped_blocks(params.depth, params.depth_single_blocks, blocks_to_swap)
    return (*(f"double_blocks.{index}." for index in double), *(f"single_blocks.{index}." for index in single))


def swappable_weights(block: nn.Module) -> Iterator[nn.Parameter]:
    """The frozen matrices of a block, with the scales of those that are stored in fewer bits: nearly all its bytes.

    Biases, norms and adapters are small and stay; so does what never is on the device.
    """
    for module in block.modules():
        if getattr(module, "stays_on_host", False):
            continue
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            yield cast(nn.Parameter, module.weight)
            scale = getattr(module, "weight_scale", None)
            if isinstance(scale, nn.Parameter):
                yield scale


class BlockSwap:
    """Swaps while attached; a context manager. The Linears of the blocks must not keep their weight for backward.

    Works for forward passes with and without gradients, in any order and also broken off by an error, and for
    backward with or without checkpointing.
    """

    def __init__(
        self,
        double_blocks: Sequence[nn.Module],
        single_blocks: Sequence[nn.Module],
        blocks_to_swap: int,
        mover: Mover,
    ) -> None:
        self._double_blocks, self._single_blocks = list(double_blocks), list(single_blocks)
        self._choose(blocks_to_swap)
        self._mover = mover
        self._occupant: list[int | None] = [None] * NUM_SLOTS
        self._handles: list[RemovableHandle] = []

    def _choose(self, blocks_to_swap: int) -> None:
        double, single = swapped_blocks(len(self._double_blocks), len(self._single_blocks), blocks_to_swap)
        self._blocks = [
            *(self._double_blocks[index] for index in double),
            *(self._single_blocks[index] for index in single),
        ]
        self._count = blocks_to_swap

    @property
    def num_swapped(self) -> int:
        return len(self._blocks)

    @property
    def blocks_to_swap(self) -> int:
        """The count by the reference's rule."""
        return self._count

    @property
    def largest(self) -> int:
        """The largest count that the model has the blocks for."""
        return max_blocks_to_swap(len(self._double_blocks), len(self._single_blocks))

    def change(self, blocks_to_swap: int) -> None:
        """Swaps another number of blocks from here on, attached or not before. Only while nothing waits for backward.

        When memory runs out on the way it may be called again with a larger number.
        """
        self.detach()
        self._choose(blocks_to_swap)
        # First what goes to main memory, then what comes from there.
        self.attach()
        chosen = {id(block) for block in self._blocks}
        for block in (*self._double_blocks, *self._single_blocks):
            if id(block) not in chosen:
                for weight in swappable_weights(block):
                    weight.data = weight.data.to(self._mover.device)

    def attach(self) -> None:
        """Evicts the blocks and begins to move them as they are needed."""
        if self._handles:
            raise ValueError("the swap is attached already")
        blocks = {turn: list(swappable_weights(block)) for turn, block in enumerate(self._blocks)}
        self._mover.take(blocks, NUM_SLOTS)
        for turn in range(min(NUM_SLOTS, len(self._blocks))):
            self._fetch(turn)
        for turn, block in enumerate(self._blocks):
            self._handles += [
                block.register_forward_pre_hook(partial(self._before_forward, turn)),
                block.register_forward_hook(partial(self._after_forward, turn)),
            ]

    def detach(self) -> None:
        """Stops swapping; all weights lie in main memory afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._mover.close()
        self._occupant = [None] * NUM_SLOTS

    def __enter__(self) -> BlockSwap:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # ---- when --------------------------------------------------------------------------------------------------

    def _before_forward(self, turn: int, _block: nn.Module, _inputs: object) -> None:
        self._need(turn)

    def _after_forward(
        self, turn: int, _block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]
    ) -> None:
        if _in_backward():
            return  # a checkpointed block that runs again: its backward follows at once
        outputs = output if isinstance(output, tuple) else (output,)
        tracked = [tensor for tensor in outputs if tensor.requires_grad]
        if tracked:
            self._watch(turn, tracked)
            if turn + NUM_SLOTS < len(self._blocks):
                self._fetch(turn + NUM_SLOTS)
        else:
            # No backward will follow: what comes after the last block is the first one of the next pass.
            self._fetch((turn + NUM_SLOTS) % len(self._blocks))

    def _watch(self, turn: int, outputs: Sequence[Tensor]) -> None:
        """Calls `_before_backward` when the gradients of all outputs are there: all later blocks are done then."""
        remaining = len(outputs)

        def arrived(_gradient: Tensor) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                self._before_backward(turn)

        for tensor in outputs:
            # Also before the last one: the block's own backward may begin with any of them.
            tensor.register_hook(lambda _gradient: self._need(turn))
            tensor.register_hook(arrived)

    def _before_backward(self, turn: int) -> None:
        self._need(turn)
        if turn >= 1:
            self._fetch(turn - 1)

    # ---- where -------------------------------------------------------------------------------------------------

    def _need(self, turn: int) -> None:
        self._fetch(turn)
        self._mover.wait(turn)

    def _fetch(self, turn: int) -> None:
        """Brings a block into its slot unless it is there; who is there makes room."""
        slot = turn % NUM_SLOTS
        occupant = self._occupant[slot]
        if occupant == turn:
            return
        if occupant is not None:
            self._mover.evict(occupant)
        # An error in between leaves the slot empty, not wrong.
        self._occupant[slot] = None
        self._mover.fetch(turn, slot)
        self._occupant[slot] = turn


def _in_backward() -> bool:
    """Whether the running code was called by autograd, as a checkpointed block is when it runs again."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
