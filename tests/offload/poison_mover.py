"""A mover for tests: what is not resident is NaN, and every call is written down.

Numbers of types that have no NaN are made wrong; where weights are of such a type, the scales beside them are NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trainer.offload.mover import HostMover

Call = tuple[Literal["fetch", "wait", "evict", "work"], int]


class PoisonMover(HostMover):
    """Moves as the `HostMover` does, and makes sure that a weight used while it is away spoils the result.

    Evicted parameters point to NaN instead of main memory, and the slot they leave is filled with NaN. A fetched block
    becomes whole only when it was waited for.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls: list[Call] = []
        self.bytes_to_device = 0
        self.most_resident = 0
        self._gives_back = False

    @property
    def transfers(self) -> list[int]:
        """The blocks that were brought in, in order."""
        return [key for kind, key in self.calls if kind == "fetch"]

    def stored(self) -> list[tuple[nn.Parameter, ...]]:
        """The parameters of each block that it has taken over."""
        return [block.parameters for block in self._blocks.values()]

    def fetch(self, key: int, slot: int) -> None:
        self.calls.append(("fetch", key))
        if any(block.slot == slot for block in self._blocks.values()):
            raise AssertionError(f"block {key} is fetched into slot {slot}, which is taken")
        super().fetch(key, slot)
        self.bytes_to_device += self._blocks[key].num_bytes
        self.most_resident = max(self.most_resident, len(self.resident()))
        self._poison(key)

    def wait(self, key: int) -> None:
        self.calls.append(("wait", key))
        block = self._blocks[key]
        if block.slot is None:
            raise AssertionError(f"block {key} is waited for and was not fetched")
        for view, source in zip(self._views(block, block.slot), block.host, strict=True):
            view.copy_(source)

    def evict(self, key: int) -> None:
        self.calls.append(("evict", key))
        self._poison(key)
        super().evict(key)

    def close(self) -> None:
        self._gives_back = True
        super().close()

    def _poison(self, key: int) -> None:
        block = self._blocks[key]
        if block.slot is not None:
            for view in self._views(block, block.slot):
                view.copy_(_poison_like(view))

    def _point_to_host(self, key: int) -> None:
        if self._gives_back:
            super()._point_to_host(key)
            return
        block = self._blocks[key]
        for parameter, host in zip(block.parameters, block.host, strict=True):
            parameter.data = _poison_like(host)


def _poison_like(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point:
        return torch.full(tensor.shape, torch.nan).to(tensor.dtype)
    return torch.full_like(tensor, 85)
