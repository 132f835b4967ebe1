# SPDX-License-Identifier: Apache-2.0
"""Queries that are made in a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hullkit.prompt_batch import prefetched


def test_queries_come_in_order_and_are_made_ahead() -> None:
    made: list[int] = []
    third = threading.Event()
    threads = set()

    def source() -> Iterator[int]:
        for i in range(6):
            threads.add(threading.current_thread())
            made.append(i)
            if i == 2:
                third.set()
            yield i

    queries: Any = prefetched(source(), ahead=2)
    assert next(queries) == 0
    assert third.wait(10)  # two more, while nobody asks
    assert made == [0, 1, 2]
    assert list(queries) == [1, 2, 3, 4, 5]
    assert len(threads) == 1
    assert not threads & {threading.current_thread()}
    assert list(prefetched([])) == []


def test_an_error_comes_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield 0
        raise OSError("a file is gone")

    queries = prefetched(source(), ahead=4)
    assert next(queries) == 0
    with pytest.raises(OSError, match="a file is gone"):
        next(queries)


def test_a_closed_stream_makes_no_more() -> None:
    made: list[int] = []
    gate = threading.Event()

    def source() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if i:
                assert gate.wait(10)
            yield i

    queries: Any = prefetched(source(), ahead=5)
    assert next(queries) == 0
    closing = threading.Thread(target=queries.close)
    closing.start()
    gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert len(made) <= 7
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetched")]


@pytest.mark.parametrize(("ahead", "kind"), [(0, ValueError), (1.5, TypeError)])
def test_a_bad_number_is_refused_before_the_first_query(ahead: Any, kind: type) -> None:
    with pytest.raises(kind, match="ahead"):
        prefetched([1], ahead)
