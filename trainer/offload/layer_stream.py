"""An encoder too large for the device, computed there layer by layer: the layers lie in main memory and come in turn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainer.offload.block_swap import NUM_SLOTS, BlockSwap
from trainer.offload.mover import Mover


class LayerStream(BlockSwap):
    """A swap of all Linear weights of `layers`, which run one after the other and without gradients.

    While a layer computes, the next one is on its way. What else the layers have must be on the device.
    """

    def __init__(self, layers: Sequence[nn.Module], mover: Mover) -> None:
        super().__init__(layers, (), 0, mover)

    def _choose(self, blocks_to_swap: int) -> None:
        self._blocks = list(self._double_blocks)
        self._count = blocks_to_swap

    def _after_forward(self, turn: int, _block: nn.Module, _inputs: object, output: object) -> None:
        self._fetch((turn + NUM_SLOTS) % len(self._blocks))
