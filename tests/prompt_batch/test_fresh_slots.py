# SPDX-License-Identifier: Apache-2.0
"""Which factors a query begins with, and what slots hold when a stream has ended in any way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import hullkit
import pytest
from _models import llama
from _prompts import DEVICE, TOGETHER, batch_of, is_fresh, text
from hullkit.prompt_batch import stream
from hullkit.prompt_batch.factors import SlotFactors

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


def batch(slots: int, **options: Any) -> hullkit.PromptBatch:
    return batch_of(llama().to(DEVICE), slots, **TOGETHER | options)


def query(length: int = 9, count: int = 1, **options: Any) -> hullkit.Query:
    return hullkit.Query([text(length, length)], [count], **options)


def test_slots_become_fresh_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before the first query, then once after each pass that ends some."""
    resets: list[list[int]] = []
    reset = SlotFactors.reset_

    def noted(self: SlotFactors, slots: Iterable[int], seed: int) -> None:
        resets.append(sorted(slots))
        reset(self, resets[-1], seed)

    own = batch(3)
    monkeypatch.setattr(SlotFactors, "reset_", noted)
    answers = [*own.map([query()] * 4 + [query(seed=7)])]
    assert [a.error for a in answers] == [None] * 5
    assert resets == [[0, 1, 2], [0, 1, 2], [1], [1, 2]]  # [1]: to another seed
    assert all(is_fresh(own, k) for k in range(3))


def test_a_seed_that_is_set_between_two_queries() -> None:
    """The batch's and the query's own: a slot became fresh with the one before."""

    def queries(own: hullkit.PromptBatch, seed: int | None) -> Iterator[hullkit.Query]:
        yield query(count=3)
        own.seed = 5
        yield query(count=3, seed=seed)

    wanted = [a.losses for a in batch(1, seed=5).map([query(count=3)])]
    for seed in (None, 5):
        own = batch(1)
        first, second = (a.losses for a in own.map(queries(own, seed)))
        assert second == wanted[0]
        assert first[-1] != second[-1] or first != second


def test_after_a_failed_pass_and_a_failed_then() -> None:
    def fail(_: Any) -> None:
        raise ValueError("mine")

    queries = [query(), query(lr=1e30, count=4), query(then=fail)]
    own = batch(3)
    answers = [*own.map(queries)]
    assert answers[0].error is None
    assert isinstance(answers[2].error, ValueError)
    assert all(is_fresh(own, k) for k in range(3))
    kept = own.adapt_(queries)
    failed = [a.error is not None for a in kept]
    assert failed[2]
    assert [is_fresh(own, k) for k in range(3)] == failed


@pytest.mark.parametrize("moment", ["start", "reset", "end"])
def test_an_error_in_between(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal's handler raises one: when a slot was started, is reset, or has ended."""
    own = batch(2)
    started = own._start
    end = stream.Stream._end

    def start(slot: int, run: Any) -> None:
        started(slot, run)
        raise KeyboardInterrupt

    def ended(self: Any, slot: int, run: Any, answer: Any) -> None:
        monkeypatch.setattr(self, "_runs", Dropping(self._runs))
        end(self, slot, run, answer)

    class Dropping(list[Any]):
        def __setitem__(self, *_: Any) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

    if moment == "start":
        monkeypatch.setattr(own, "_start", start)
    elif moment == "end":
        monkeypatch.setattr(stream.Stream, "_end", ended)
    else:
        reset, calls = own._reset, []

        def interrupted(slots: Iterable[int]) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            reset(slots)

        monkeypatch.setattr(own, "_reset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        [*own.map([query(seed=9), query()])]
    monkeypatch.undo()
    assert all(is_fresh(own, k) for k in range(2))
    assert [a.error for a in own.map([query()])] == [None]


def test_losses_of_queries_that_end_at_different_passes() -> None:
    """Results are fetched when a query ends, also those that a neighbour has fetched before."""
    queries = [hullkit.Query([text(9 + n, n)] * n, [1] * n) for n in (1, 4, 2, 3, 1, 5)]
    answers = [*batch(3).map(queries)]
    for answer, own in zip(answers, queries, strict=True):
        [alone] = batch(3).map([own])
        assert answer.error is None
        assert len(answer.losses) == len(own.examples)
        assert answer.losses == pytest.approx(
            alone.losses, rel=1e-5 if DEVICE.type == "cpu" else 2e-2
        )
