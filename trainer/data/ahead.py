"""Work in threads ahead of whoever asks for its results."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

NUM_THREADS = max(1, min(8, os.cpu_count() or 1))
"""Decoding releases the interpreter, so threads use that many cores."""


def map_ahead(
    function: Callable[[T], R], values: Iterable[T], *, num_threads: int = NUM_THREADS, num_ahead: int | None = None
) -> Generator[R, None, None]:
    """`function` of each value, in order, computed in threads up to `num_ahead` values before they are asked for.

    Closing the iterator, or an error, drops what has not begun.
    """
    remaining = iter(values)
    window: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pictures")
    try:
        for value in itertools.islice(remaining, num_ahead or 2 * num_threads):
            window.append(pool.submit(function, value))
        while window:
            result = window.popleft().result()
            for value in itertools.islice(remaining, 1):
                window.append(pool.submit(function, value))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
