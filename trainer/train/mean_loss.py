"""The mean of the last losses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence


class MeanLoss:
    """The reference's `loss/average`: the mean over the last epoch's worth of steps, kept in constant time."""

    def __init__(self, window: int, values: Sequence[float] = (), total: float | None = None) -> None:
        """`values` are earlier losses, `total` their sum as it was kept: its last digits depend on those before them."""
        self._values: deque[float] = deque(values, maxlen=max(window, 1))
        self._sum = total if total is not None and len(self._values) == len(values) else math.fsum(self._values)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(self._values)

    @property
    def total(self) -> float:
        return self._sum

    @property
    def value(self) -> float:
        """The mean so far; NaN before the first step."""
        return self._sum / len(self._values) if self._values else math.nan

    def add(self, value: float) -> float:
        if len(self._values) == self._values.maxlen:
            self._sum -= self._values[0]
        self._values.append(value)
        self._sum += value
        return self.value
