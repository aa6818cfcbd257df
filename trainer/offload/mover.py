"""Moves the weights of blocks between main memory and the device. The only place that uses CUDA streams and events.

A mover has a few slots on the device; block k always uses slot k mod their number, so that each slot is as large as the
largest block that takes turns in it. A block's weights lie in main
memory for good and are copied into a slot when needed; frozen weights never have to be copied back.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

_ALIGNMENT = 256
"""Bytes; where each weight begins in a slot."""


class Mover(Protocol):
    """Where blocks are. `key` names a block; `slot` counts from 0.

    Weights of a block that is not in a slot must not be used: they are in main memory, or not there at all.
    """

    device: torch.device

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
    """One block: its parameters, the slab in main memory that holds them, their tensors there, and where each begins."""

    parameters: tuple[nn.Parameter, ...]
    slab: Tensor
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
            block = self._blocks[key] = self._in_slab(parameters)
            sizes[key % num_slots] = max(sizes[key % num_slots], block.slab.nbytes)
            # At once, so that no more than one block is in memory twice.
            self._point_to_host(key)
        self._slots = [self._new_slot(size) for size in sizes]

    def fetch(self, key: int, slot: int) -> None:
        block = self._blocks[key]
        self._slots[slot][: block.slab.nbytes].copy_(block.slab)
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

    def _in_slab(self, parameters: Sequence[nn.Parameter]) -> _Stored:
        """The block in one piece of main memory, laid out as in a slot: one copy brings it there."""
        offsets: list[int] = []
        end = 0
        for parameter in parameters:
            offsets.append(end)
            end = -(-(end + parameter.data.nbytes) // _ALIGNMENT) * _ALIGNMENT
        slab = self._new_slab(end)
        host = tuple(_cut(slab, offset, parameter.data) for offset, parameter in zip(offsets, parameters, strict=True))
        for view, parameter in zip(host, parameters, strict=True):
            view.copy_(parameter.data)
        return _Stored(tuple(parameters), slab, host, tuple(offsets))

    def _new_slab(self, num_bytes: int) -> Tensor:
        # Zeros, as gaps between the weights are copied too.
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def _new_slot(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _views(self, block: _Stored, slot: int) -> tuple[Tensor, ...]:
        """The slot's memory, cut and shaped for the block's weights."""
        if slot not in block.views:
            block.views[slot] = tuple(
                _cut(self._slots[slot], offset, host) for offset, host in zip(block.offsets, block.host, strict=True)
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

    def __init__(self, device: torch.device, warn: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(device)
        self._warn = warn
        self._registered: list[int] = []
        self._could_pin = True
        self._stream = torch.cuda.Stream(device)
        self._free: dict[int, torch.cuda.Event] = {}
        self._arrived: dict[int, torch.cuda.Event] = {}

    def take(self, blocks: Mapping[int, Sequence[nn.Parameter]], num_slots: int) -> None:
        super().take(blocks, num_slots)
        # Whoever had the slots' memory before may not be done with it.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def fetch(self, key: int, slot: int) -> None:
        block = self._blocks[key]
        free = self._free.get(slot)
        if free is not None:
            self._stream.wait_event(free)
        with torch.cuda.stream(self._stream):
            self._slots[slot][: block.slab.nbytes].copy_(block.slab, non_blocking=True)
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
        for address in self._registered:
            unregister_pages(address)
        self._registered.clear()

    def _new_slab(self, num_bytes: int) -> Tensor:
        """A slab in page-locked memory; where the system refuses that, in ordinary memory, with a warning."""
        # Whole pages of its own: what is registered may not overlap. (torch's own page-locked allocator would round each
        # slab up to a power of two, up to twice its size.)
        size = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        room = torch.zeros(size + mmap.PAGESIZE, dtype=torch.uint8)
        start = -room.data_ptr() % mmap.PAGESIZE
        if self._could_pin:
            self._could_pin = register_pages(room.data_ptr() + start, size, self.device)
            if self._could_pin:
                self._registered.append(room.data_ptr() + start)
            else:
                self._warn(
                    "the system gives no more page-locked memory (see ulimit -l, or a container's memlock): the rest of the "
                    "swapped blocks lie in ordinary memory, from which copies are slower"
                )
        return room[start : start + num_bytes]


def _cut(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """The place of a tensor in a slab or slot, in its type and shape."""
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def register_pages(address: int, num_bytes: int, device: torch.device) -> bool:
    """Locks pages of main memory for copies to the device; False where the system refuses."""
    cudart = cast(Any, torch.cuda).cudart()
    with torch.cuda.device(device):
        if int(cudart.cudaHostRegister(address, num_bytes, 0)) == 0:
            return True
        # The refusal stands as CUDA's last error, which the next kernel's launch would report as its own.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device).add_(1)
    return False


def unregister_pages(address: int) -> None:
    """Undoes `register_pages`."""
    cast(Any, torch.cuda).cudart().cudaHostUnregister(address)


def make_mover(device: torch.device, warn: Callable[[str], None] = lambda _: None) -> Mover:
    """The mover for a device. `warn` is told when memory could not be page-locked."""
    return CudaMover(device, warn) if device.type == "cuda" else HostMover(device)
