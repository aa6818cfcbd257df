"""Brings single weights to the device for the moment of one product, in the order in which they are used."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_PLACES = 3
"""Weights on the device at once: the two of a double block arrive while the block before is at work."""
_NUM_STAGES = 2


class Courier:
    """Copies at once; what it gives is the caller's. `num_bytes` counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = 0

    def __call__(self, weight: Tensor) -> Tensor:
        """`weight`, in main memory, on the device. Use it before the next call but one."""
        self.num_bytes += weight.nbytes
        return torch.empty_like(weight, device=self.device).copy_(weight)


class CudaCourier(Courier):
    """Copies beside the computation: through page-locked memory, on a stream of its own, into places that take turns.

    A copy into a place comes after the work that was given to the device before the last call but one: by then the
    weight that was there had been used.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._places: list[Tensor | None] = [None] * NUM_PLACES
        self._stages: list[Tensor | None] = [None] * _NUM_STAGES
        self._staged: list[torch.cuda.Event | None] = [None] * _NUM_STAGES
        self._calls: list[torch.cuda.Event] = []
        self._count = 0

    def __call__(self, weight: Tensor) -> Tensor:
        self.num_bytes += weight.nbytes
        turn, self._count = self._count, self._count + 1
        now = torch.cuda.Event()
        now.record(torch.cuda.current_stream(self.device))
        self._calls = [*self._calls, now][-NUM_PLACES:]
        stage = self._stage(turn % _NUM_STAGES, weight)
        place = self._place(turn % NUM_PLACES, weight)
        if len(self._calls) == NUM_PLACES:
            self._stream.wait_event(self._calls[0])
        with torch.cuda.stream(self._stream):
            place.copy_(stage, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._staged[turn % _NUM_STAGES] = arrived
        torch.cuda.current_stream(self.device).wait_event(arrived)
        return place

    def _stage(self, index: int, weight: Tensor) -> Tensor:
        """The weight in page-locked memory, once the copy from there before is done."""
        staged, memory = self._staged[index], self._stages[index]
        if staged is not None:
            staged.synchronize()
        if memory is None or memory.nbytes < weight.nbytes:
            memory = self._stages[index] = torch.empty(weight.nbytes, dtype=torch.uint8, pin_memory=True)
        return _cut(memory, weight).copy_(weight)

    def _place(self, index: int, weight: Tensor) -> Tensor:
        memory = self._places[index]
        if memory is None or memory.nbytes < weight.nbytes:
            if memory is not None:
                memory.record_stream(self._stream)
            memory = self._places[index] = torch.empty(weight.nbytes, dtype=torch.uint8, device=self.device)
            # Whoever had this memory before may not be done with it.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return _cut(memory, weight)


def _cut(memory: Tensor, like: Tensor) -> Tensor:
    return memory[: like.nbytes].view(like.dtype).view(like.shape)


def make_courier(device: torch.device) -> Courier:
    return CudaCourier(device) if device.type == "cuda" else Courier(device)
