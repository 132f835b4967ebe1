# SPDX-License-Identifier: Apache-2.0
"""Queries that are made while earlier ones are adapted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .._checks import check_int

T = TypeVar("T")


def prefetched(queries: Iterable[T], ahead: int = 16) -> Iterator[T]:
    """The same queries in the same order, made in a thread of their own.

    A generator that retrieves texts and selects examples works so while `PromptBatch.map` adapts
    earlier queries. Python's own work takes turns with the passes' launches; native calls such as
    `hullkit.select`, and files that are read, do not. A generator that runs the batch's own model,
    to embed prompts for example, must not be here: in a pass its layers are the slots', and a call
    of another thread raises RuntimeError. A query waits with the tensors that it has: one that is
    filled anew for a later query is read with those values. Closing the iterator waits for the
    query that is made.

    Args:
        queries: what makes them; one thread iterates over it, one query after the other.
        ahead: the most queries that are made before they are asked for.

    Raises:
        TypeError, ValueError: `ahead` is no integer >= 1. What `queries` raises, in its place.

    >>> from hullkit.prompt_batch import prefetched
    >>> list(prefetched(range(3), ahead=2))
    [0, 1, 2]
    """
    return _prefetched(iter(queries), check_int("ahead", ahead, 1))


def _prefetched(queries: Iterator[T], ahead: int) -> Iterator[T]:
    end: Any = object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetched")
    try:
        waiting = deque(thread.submit(next, queries, end) for _ in range(ahead))
        while (query := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, queries, end))
            yield query
    finally:
        thread.shutdown(cancel_futures=True)
