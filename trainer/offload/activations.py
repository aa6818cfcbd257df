"""Checkpointed block inputs wait in main memory instead of on the device (`--cpu_offload_checkpointing`).

    forward    the inputs of block i go to main memory while block i runs
    backward   before block i runs again its inputs must be there; while it runs, those of block i - 1 come

On NVIDIA GPUs the copies run beside the computation: page-locked memory, one stream for each direction, one event for
each copy. Two slots on the device take turns, as block i - 1 arrives while block i is at work. Elsewhere copies are made
at once. The values are the same to the last bit.
"""

from __future__ import annotations

import weakref
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_SLOTS = 2


class OffloadedCheckpoint:
    """Runs blocks so that of each nothing but its streams is kept for backward, and those in main memory.

    `num_bytes_out` and `num_bytes_in` count what was copied each way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes_out = 0
        self.num_bytes_in = 0
        self._copies = _CudaCopies(device) if device.type == "cuda" else _Copies(device)
        self._last: weakref.ref[_Kept] | None = None
        self._occupants: list[weakref.ref[_Kept] | None] = [None] * NUM_SLOTS

    def __call__(self, block: nn.Module, streams: tuple[Tensor, ...], others: tuple[object, ...]) -> object:
        """What the block gives for `streams`, which wait in main memory, and `others`, which stay."""
        before = None if self._last is None else self._last()
        kept = _Kept(self, streams, before)
        self._last = weakref.ref(kept)

        def run(*given: object) -> object:
            return block(*kept.take(), *given)

        # torch keeps the random state of the devices of the tensors it is given: the second run draws the same dropout.
        output = checkpoint(run, *others, use_reentrant=False)
        kept.given = None
        return output

    def to_host(self, tensor: Tensor) -> _OnHost:
        self.num_bytes_out += tensor.nbytes
        return self._copies.to_host(tensor)

    def to_device(self, kept: _Kept) -> list[Tensor]:
        """Begins to bring what `kept` needs into its slot."""
        occupant = self._occupants[kept.slot]
        other = None if occupant is None else occupant()
        if other is not None:
            # A pass that goes another way than it came: what was fetched in vain is fetched again when it is needed.
            other.brought = None
        self._occupants[kept.slot] = weakref.ref(kept)
        self.num_bytes_in += sum(tensor.memory.nbytes for tensor in kept.on_host)
        return self._copies.to_device(kept.on_host, kept.slot)

    def wait(self, slot: int) -> None:
        """Makes the device's work from here on wait until what was brought to the slot has arrived."""
        self._copies.wait(slot)


class _Kept:
    """The streams that one block was given. The graph that needs them for backward holds them, and nobody else."""

    def __init__(self, owner: OffloadedCheckpoint, streams: tuple[Tensor, ...], before: _Kept | None) -> None:
        self._owner = owner
        # Blocks that are neighbours in a pass never use the same slot.
        self.slot = 0 if before is None else (before.slot + 1) % NUM_SLOTS
        self._before = None if before is None else weakref.ref(before)
        self._needs_grad = [tensor.requires_grad for tensor in streams]
        self.on_host = [owner.to_host(tensor.detach()) for tensor in streams]
        self.brought: list[Tensor] | None = None
        self.given: tuple[Tensor, ...] | None = streams
        """The streams themselves, until the block has run."""

    def take(self) -> tuple[Tensor, ...]:
        """The streams for the block's run: the given ones in forward, those from main memory when it runs again."""
        if self.given is not None:
            return self.given
        self.bring()
        self._owner.wait(self.slot)
        brought = cast("list[Tensor]", self.brought)
        self.brought = None
        before = None if self._before is None else self._before()
        if before is not None:
            before.bring()
        return tuple(
            tensor.detach().requires_grad_(needs) for tensor, needs in zip(brought, self._needs_grad, strict=True)
        )

    def bring(self) -> None:
        """Begins to copy the streams to the device, unless they are on their way already."""
        if self.brought is None:
            self.brought = self._owner.to_device(self)


class _OnHost:
    """A tensor in main memory, and the event of its arrival there."""

    def __init__(self, memory: Tensor, arrived: torch.cuda.Event | None = None) -> None:
        self.memory = memory
        self.arrived = arrived


class _Copies:
    """Copies at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_host(self, tensor: Tensor) -> _OnHost:
        return _OnHost(torch.empty_like(tensor, device="cpu").copy_(tensor))

    def to_device(self, tensors: list[_OnHost], slot: int) -> list[Tensor]:
        del slot
        return [torch.empty_like(tensor.memory, device=self.device).copy_(tensor.memory) for tensor in tensors]

    def wait(self, slot: int) -> None:
        """Nothing to wait for."""


class _CudaCopies(_Copies):
    """Copies on streams of their own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._slots: list[Tensor | None] = [None] * NUM_SLOTS
        self._arrived: list[torch.cuda.Event | None] = [None] * NUM_SLOTS

    def to_host(self, tensor: Tensor) -> _OnHost:
        # In the order of the tensor's own memory: one plain copy.
        memory = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            memory.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._out)
        # The device's memory is not given to others before the copy is done.
        tensor.record_stream(self._out)
        return _OnHost(memory, arrived)

    def to_device(self, tensors: list[_OnHost], slot: int) -> list[Tensor]:
        # What used this slot last is in the queue of the computing stream by now, and the copy comes after it.
        self._in.wait_stream(torch.cuda.current_stream(self.device))
        room = self._room(slot, sum(tensor.memory.nbytes for tensor in tensors))
        views: list[Tensor] = []
        start = 0
        with torch.cuda.stream(self._in):
            for tensor in tensors:
                end = start + tensor.memory.nbytes
                view = room[start:end].view(tensor.memory.dtype).view(tensor.memory.shape)
                if tensor.arrived is not None:
                    self._in.wait_event(tensor.arrived)
                view.copy_(tensor.memory, non_blocking=True)
                views.append(view)
                start = end
            arrived = torch.cuda.Event()
            arrived.record(self._in)
        self._arrived[slot] = arrived
        return views

    def wait(self, slot: int) -> None:
        arrived = self._arrived[slot]
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def _room(self, slot: int, num_bytes: int) -> Tensor:
        found = self._slots[slot]
        if found is None or found.nbytes < num_bytes:
            if found is not None:
                found.record_stream(self._in)
            found = self._slots[slot] = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return found
