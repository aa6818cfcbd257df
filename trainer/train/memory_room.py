"""What a run does when memory runs out: it makes room and goes on where it was, or says what to change.

A training step that does not fit is computed again from the same data and random numbers with more blocks swapped, which
changes no result. Pictures and captions that do not fit in one batch are encoded in smaller ones, at last on the CPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Final, TypeVar

import torch
from torch import Tensor

from trainer.data.cache import Encode
from trainer.offload.block_swap import BlockSwap
from trainer.schema.base import UserError
from trainer.schema.memory_phases import gib_text
from trainer.train.engine import Engine
from trainer.train.reporting import Reporter

T = TypeVar("T")

_ATTEMPTS: Final = 8
"""In so many portions at most the number of swapped blocks grows to the largest."""


class NoRoom(UserError):
    """The device is too small for a step, whatever is swapped. The weights are those of the last whole step, but for
    `HalfTakenStep`."""


class HalfTakenStep(NoRoom):
    """Memory ran out in the midst of the optimizer's step: some weights have taken it and others not."""


class SwapRoom:
    """Makes room on the device by swapping more blocks. `estimated_bytes` is what was expected to be needed.

    With `swap` None, or `recovers` False, it only explains.
    """

    def __init__(
        self,
        swap: BlockSwap | None,
        engine: Engine,
        reporter: Reporter,
        *,
        estimated_bytes: int,
        recovers: bool,
        batch_size: int = 1,
    ) -> None:
        self._swap = swap
        self._engine = engine
        self._reporter = reporter
        self._estimated_bytes = estimated_bytes
        self._recovers = recovers
        self._batch_size = batch_size

    def __call__(self, what: str, reason: str) -> None:
        """Called between two passes, when nothing waits for backward any more. `what` ran out of memory for `reason`.

        Raises `NoRoom` (exit code 3) when there is no more room to make.
        """
        self._engine.free_cached_memory()
        gc.collect()
        numbers = self._numbers(reason)
        swap = self._swap
        if swap is None or not self._recovers or swap.blocks_to_swap >= swap.largest:
            raise NoRoom(f"the device ran out of memory in {what}: {numbers}", hint=self._hint())
        before = swap.blocks_to_swap
        while True:
            count = min(swap.blocks_to_swap + max(1, math.ceil(swap.largest / _ATTEMPTS)), swap.largest)
            try:
                swap.change(count)
                break
            except torch.OutOfMemoryError as error:
                if count == swap.largest:
                    raise NoRoom(f"the device ran out of memory in {what}: {error}", hint=self._hint()) from error
        self._engine.free_cached_memory()
        self._reporter.warning(
            f"the device ran out of memory in {what}: {numbers}. blocks_to_swap goes from {before} to {count} and it is "
            f"computed again, with the same data and random numbers; --blocks_to_swap={count} saves this next time"
        )

    def _numbers(self, reason: str) -> str:
        total, peak = self._engine.total_bytes(), self._engine.peak_bytes()
        parts = [
            *([f"{gib_text(peak)} in use at most"] if peak else []),
            *([f"the device has {gib_text(total)}"] if total is not None else []),
            f"the estimate was {gib_text(self._estimated_bytes)}",
            *([f"{self._swap.blocks_to_swap} blocks were swapped"] if self._swap is not None else []),
        ]
        first = reason.strip().splitlines()[0] if reason.strip() else ""
        return f"{', '.join(parts)}{f' ({first})' if first else ''}"

    def _hint(self) -> str:
        swap = self._swap
        remedies = ["lower the resolution"]
        if self._batch_size > 1:
            remedies.insert(0, f"lower train_batch_size from {self._batch_size}")
        if swap is not None and swap.blocks_to_swap < swap.largest:
            remedies.insert(0, "raise blocks_to_swap or leave no_oom_recovery out")
        remedies.append("turn on gradient_checkpointing and both caches where they are off")
        text = "Close other programs on this device, " + ", ".join(remedies) + "."
        if swap is not None and swap.blocks_to_swap >= swap.largest:
            text = f"Every block that can be swapped is. {text}"
        return text


def encode_in_room(
    encode: Encode[T],
    on_cpu: Callable[[], Encode[T]] | None,
    what: str,
    engine: Engine,
    reporter: Reporter,
) -> Encode[T]:
    """`encode`, which halves its batches when they do not fit on the device, and at last goes to the CPU.

    `on_cpu` gives what encodes there; None where that is where it is already.
    """
    largest = math.inf
    other: Encode[T] | None = None

    def encode_part(keys: list[str], inputs: list[T]) -> list[dict[str, Tensor]]:
        nonlocal largest, other
        if other is not None:
            return list(other(keys, inputs))
        if len(keys) > largest:
            middle = len(keys) // 2
            return [*encode_part(keys[:middle], inputs[:middle]), *encode_part(keys[middle:], inputs[middle:])]
        try:
            return list(encode(keys, inputs))
        except torch.OutOfMemoryError as error:
            reason = str(error).strip().splitlines()[0]
        # Outside of the handler: it would keep the tensors of the failed attempt alive.
        engine.free_cached_memory()
        if len(keys) > 1:
            largest = math.ceil(len(keys) / 2)
            reporter.warning(
                f"{len(keys)} {what} at once do not fit on the device ({reason}): {largest} at once from now on"
            )
            return encode_part(keys, inputs)
        if on_cpu is None:
            raise UserError(f"one of the {what} does not fit in memory: {reason}", hint="Lower the resolution.")
        reporter.warning(
            f"{what} do not fit on the device, not even one at once ({reason}): the CPU encodes them, slowly"
        )
        other = on_cpu()
        return list(other(keys, inputs))

    return encode_part
