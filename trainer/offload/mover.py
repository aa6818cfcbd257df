"""Moves the weights of blocks between main memory and the device. The only place that uses CUDA streams and events.

A mover has a few slots on the device; block k always uses slot k mod their number, so that each slot is as large as the
largest block that takes turns in it. A block's weights lie in main
memory for good and are copied into a slot when needed; frozen weights never have to be copied back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

_ALIGNMENT = 256
"""Bytes; where each weight begins in a slot."""


class Mover(Protocol):
    """Where blocks are. `key` names a block; `slot` counts from 0.

    Weights of a block that is not in a slot must not be used: they are in main memory, or not there at all.
    """

    def take(self, blocks: Mapping[int, Sequence[nn.Parameter]], num_slots: int) -> None:
        """Takes over the weights of all blocks and makes the slots; every block is evicted afterwards."""
        ...

    def fetch(self, key: int, slot: int) -> None:
        """Begins to bring a block into a slot that is free. Later work on the device sees its weights after `wait`."""
        ...

    def wait(self, key: int) -> None:
        """Makes the device's work from here on wait until the block has arrived."""
        ...

    def evict(self, key: int) -> None:
        """Frees the block's slot once the work given to the device so far is done."""
        ...

    def resident(self) -> frozenset[int]:
        """The blocks in slots, arrived or on their way."""
        ...

    def resident_bytes(self) -> int:
        """Bytes of the weights of the blocks in slots."""
        ...

    def close(self) -> None:
        """Gives every weight back as it lies in main memory, and the slots to the allocator."""
        ...


@dataclass
class _Stored:
    """One block: its parameters, their tensors in main memory, and where each begins in a slot."""

    parameters: tuple[nn.Parameter, ...]
    host: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    slot: int | None = None
    views: dict[int, tuple[Tensor, ...]] = field(default_factory=dict[int, "tuple[Tensor, ...]"])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host)


class HostMover:
    """For a CPU, and for devices without streams of their own: copies at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: dict[int, _Stored] = {}
        self._slots: list[Tensor] = []

    def take(self, blocks: Mapping[int, Sequence[nn.Parameter]], num_slots: int) -> None:
        sizes = [0] * num_slots
        for key, parameters in blocks.items():
            offsets: list[int] = []
            end = 0
            for parameter in parameters:
                offsets.append(end)
                end = -(-(end + parameter.data.nbytes) // _ALIGNMENT) * _ALIGNMENT
            sizes[key % num_slots] = max(sizes[key % num_slots], end)
            host = tuple(self._to_host(parameter.data) for parameter in parameters)
            self._blocks[key] = _Stored(tuple(parameters), host, tuple(offsets))
            # At once: what was copied must not lie in main memory twice, for one block at most.
            self._point_to_host(key)
        self._slots = [self._new_slot(size) for size in sizes]

    def fetch(self, key: int, slot: int) -> None:
        block = self._blocks[key]
        for view, source in zip(self._views(block, slot), block.host, strict=True):
            view.copy_(source)
        self._occupy(block, slot)

    def wait(self, key: int) -> None:
        """Nothing to wait for: a fetch is done when it returns."""

    def evict(self, key: int) -> None:
        self._point_to_host(key)
        self._blocks[key].slot = None

    def resident(self) -> frozenset[int]:
        return frozenset(key for key, block in self._blocks.items() if block.slot is not None)

    def resident_bytes(self) -> int:
        return sum(block.num_bytes for block in self._blocks.values() if block.slot is not None)

    def close(self) -> None:
        for key in self._blocks:
            self.evict(key)
        self._blocks.clear()
        self._slots.clear()

    def _to_host(self, weight: Tensor) -> Tensor:
        return weight.to("cpu").contiguous()

    def _new_slot(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _views(self, block: _Stored, slot: int) -> tuple[Tensor, ...]:
        """The slot's memory, cut and shaped for the block's weights."""
        if slot not in block.views:
            block.views[slot] = tuple(
                self._slots[slot][offset : offset + host.nbytes].view(host.dtype).view(host.shape)
                for offset, host in zip(block.offsets, block.host, strict=True)
            )
        return block.views[slot]

    def _occupy(self, block: _Stored, slot: int) -> None:
        # Through `.data`: optimizers, hooks and the module itself keep the same Parameter.
        for parameter, view in zip(block.parameters, self._views(block, slot), strict=True):
            parameter.data = view
        block.slot = slot

    def _point_to_host(self, key: int) -> None:
        block = self._blocks[key]
        for parameter, host in zip(block.parameters, block.host, strict=True):
            parameter.data = host


class CudaMover(HostMover):
    """For NVIDIA GPUs: page-locked main memory, a stream of its own for the copies, one event for each arrival.

    Two orders are kept: a copy into a slot waits for the work that still reads the slot, and work that reads the block
    waits for the copy.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._free: dict[int, torch.cuda.Event] = {}
        self._arrived: dict[int, torch.cuda.Event] = {}

    def fetch(self, key: int, slot: int) -> None:
        block = self._blocks[key]
        free = self._free.get(slot)
        if free is not None:
            self._stream.wait_event(free)
        with torch.cuda.stream(self._stream):
            for view, source in zip(self._views(block, slot), block.host, strict=True):
                view.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._arrived[key] = arrived
        self._occupy(block, slot)

    def wait(self, key: int) -> None:
        arrived = self._arrived.pop(key, None)
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def evict(self, key: int) -> None:
        slot = self._blocks[key].slot
        if slot is not None:
            # A block that is evicted before its arrival was waited for: the next copy comes after it on the same stream.
            self._arrived.pop(key, None)
            free = torch.cuda.Event()
            free.record(torch.cuda.current_stream(self.device))
            self._free[slot] = free
        super().evict(key)

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        super().close()
        self._free.clear()
        self._arrived.clear()

    def _to_host(self, weight: Tensor) -> Tensor:
        return super()._to_host(weight).pin_memory()


def make_mover(device: torch.device) -> Mover:
    """The mover for a device."""
    return CudaMover(device) if device.type == "cuda" else HostMover(device)
