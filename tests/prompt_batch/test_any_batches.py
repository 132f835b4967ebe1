# SPDX-License-Identifier: Apache-2.0
"""PromptBatch with any queries and callers in any order: good, bad, cut short, changed meanwhile.

A query gets its answer or its own error. The model is not touched, and the next map works.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import hullkit
import pytest
import torch
from _cases import machine
from _models import VOCABULARY, Before, gpt2, llama
from _prompts import PRECISIONS
from hullkit.prompt_batch import Generate, Score
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

SLOTS = 2
IDS = torch.arange(64) * 7 % VOCABULARY


class OwnError(Exception):
    pass


def raises(model: nn.Module) -> None:
    raise OwnError


def trains(model: nn.Module) -> None:
    model.train()


def good(length: int, count: int) -> hullkit.Query:
    return hullkit.Query([IDS[:length], IDS[3:9]], [count, 1], Score(IDS[:12]))


class Unreadable(list[Tensor]):
    """Examples that lie on a disk that fails."""

    def __getitem__(self, place: Any) -> Any:
        raise OSError("examples")

    def __iter__(self) -> Iterator[Tensor]:
        raise OSError("examples")


# Each is one query's fault.
BAD: dict[str, Any] = {
    "no query": 5,
    "text": "text",
    "unreadable": (Unreadable([IDS[:5]]), [1]),
    "no examples": ([], []),
    "no list": (IDS, [1]),
    "id beyond": ([IDS[:5] + VOCABULARY], [1]),
    "negative id": ([IDS[:5] - VOCABULARY], [1]),
    "too short": ([IDS[:1]], [1]),
    "floats": ([IDS[:5].float()], [1]),
    "meta": ([IDS[:5].to("meta")], [1]),
    "no tensor": ([[1, 2, 3]], [1]),
    "no updates": ([IDS[:5]], [0]),
    "negative count": ([IDS[:5]], [-1]),
    "huge count": ([IDS[:5]], [2**70]),
    "more counts": ([IDS[:5]], [1, 1]),
    "then": ([IDS[:5]], [1], 5),
    "raises": ([IDS[:5]], [1], raises),
    "lr": ([IDS[:5]], [1], None, float("nan")),
    "huge lr": ([IDS[:5]], [3], None, 1e38),
    "lr of no float": ([IDS[:5]], [1], None, 10**400),
    "seed": ([IDS[:5]], [1], None, None, "seed"),
    "negative seed": ([IDS[:5]], [1], None, None, -1),
    "huge seed": ([IDS[:5]], [1], None, None, 2**80),
}
queries = st.one_of(
    st.builds(good, st.integers(2, 40), st.integers(0, 4)), st.sampled_from(sorted(BAD))
)
slots = st.integers(-1, SLOTS)


class AnyBatches(RuleBasedStateMachine):
    @initialize(
        make=st.sampled_from([llama, gpt2]),
        dtype=st.sampled_from([None, torch.bfloat16]),
        precision=st.sampled_from(PRECISIONS),
    )
    def begin(
        self, make: Callable[[], nn.Module], dtype: torch.dtype | None, precision: str
    ) -> None:
        self.model = make() if dtype is None else make().to(dtype)
        self.before = Before(self.model)
        self.batch = hullkit.PromptBatch(
            self.model, slots=SLOTS, rank=2, lr=1e-2, precision=precision, capture=False
        )
        self.first: dict[tuple[Any, ...], float] = {}  # a lone query's value

    @invariant()
    def nothing_is_touched(self) -> None:
        self.before.check()

    def check(self, asked: list[Any], answers: list[Any]) -> None:
        for place, (query, answer) in enumerate(zip(asked, answers, strict=False)):
            assert answer.place == place
            if isinstance(query, str):
                assert answer.error is not None, query
                assert answer.value is None
            else:
                assert answer.error is None
                assert answer.value > 0.0

    def of(self, asked: list[Any]) -> Iterator[Any]:
        return (BAD[query] if isinstance(query, str) else query for query in asked)

    @rule(asked=st.lists(queries, max_size=6))
    def map(self, asked: list[Any]) -> None:
        answers = list(self.batch.map(self.of(asked)))
        assert len(answers) == len(asked)
        self.check(asked, answers)

    @rule(length=st.sampled_from([2, 7, 33]), count=st.integers(0, 2))
    def same_bits_as_ever(self, length: int, count: int) -> None:
        [answer] = self.batch.map([good(length, count)])
        assert self.first.setdefault((length, count), answer.value) == answer.value

    @rule(asked=st.lists(queries, min_size=1, max_size=6), taken=st.integers(0, 3))
    def map_cut_short(self, asked: list[Any], taken: int) -> None:
        answers = self.batch.map(self.of(asked))
        seen = list(itertools.islice(answers, taken))
        self.check(asked, seen)
        if 0 < taken <= len(asked):  # it has begun
            for other in (self.batch.map([good(5, 1)]), self.batch.map([])):
                with pytest.raises(RuntimeError, match="no other map"):
                    next(other)
        answers.close()  # type: ignore[attr-defined]

    @rule(asked=st.lists(queries, max_size=2), at=st.integers(0, 2))
    def queries_that_break_off(self, asked: list[Any], at: int) -> None:
        def breaking() -> Iterator[Any]:
            yield from itertools.islice(self.of(asked), at)
            raise OwnError

        with pytest.raises(OwnError):
            list(self.batch.map(breaking()))

    @rule(what=st.sampled_from([5, None, object()]))
    def no_queries(self, what: Any) -> None:
        with pytest.raises(TypeError):
            list(self.batch.map(what))

    @rule(asked=st.lists(queries, max_size=SLOTS + 1))
    def adapt(self, asked: list[Any]) -> None:
        if len(asked) > SLOTS:
            with pytest.raises(ValueError, match="at most"):
                self.batch.adapt_(list(self.of(asked)))
            return
        self.check(asked, self.batch.adapt_(list(self.of(asked))))

    @rule(k=slots, leave=st.booleans())
    def slot(self, k: int, leave: bool) -> None:
        if not 0 <= k < SLOTS:
            with pytest.raises(IndexError), self.batch.slot(k):
                pass
            return
        try:
            with self.batch.slot(k) as model:
                with pytest.raises(RuntimeError, match="`slot` block"):
                    list(self.batch.map([good(5, 1)]))
                assert not model.training
                trains(model)
                if leave:
                    raise OwnError
        except OwnError:
            assert leave

    @rule(rows=st.integers(0, SLOTS + 1), length=st.integers(1, 20))
    def call(self, rows: int, length: int) -> None:
        ids = IDS[:length].expand(rows, length)
        if rows != SLOTS:
            with pytest.raises(ValueError, match="input_ids"):
                self.batch(ids)
            return
        together = self.batch(ids)
        assert together.shape == (SLOTS, length, VOCABULARY)
        for k in range(SLOTS):
            with torch.no_grad(), self.batch.slot(k) as model:
                alone = model(ids[:1]).logits[0]
            torch.testing.assert_close(together[k], alone, rtol=0.1, atol=0.05)

    @rule()
    def generate_in_a_query(self) -> None:
        [answer] = self.batch.map([([IDS[:5]], [1], Generate(IDS[:4], max_new_tokens=2))])
        assert answer.error is None
        assert answer.value.shape == (2,)

    @rule(place=st.integers(0, 30))
    def a_weight_is_written_to(self, place: int) -> None:
        parameters = list(self.model.parameters())
        with torch.no_grad():
            parameters[place % len(parameters)].mul_(0.875)
        self._look_again()

    @rule(place=st.integers(0, 30))
    def a_weight_moves(self, place: int) -> None:
        parameters = list(self.model.parameters())
        moved: Tensor = parameters[place % len(parameters)]
        moved.data = moved.data.clone()
        self._look_again()

    @rule()
    def release(self) -> None:
        self.batch.release()

    def _look_again(self) -> None:
        self.first.clear()
        self.before = Before(self.model)


AnyBatches.TestCase.settings = machine(10, 10)
TestAnyBatches = pytest.mark.usefixtures("one_thread")(AnyBatches.TestCase)


def test_a_bad_query_has_its_own_error() -> None:
    batch = hullkit.PromptBatch(llama(), slots=SLOTS, rank=2, capture=False)
    answers = list(batch.map([good(9, 2), *BAD.values(), good(5, 1)]))
    refused = [answer.error is not None for answer in answers]
    assert refused == [False, *[True] * len(BAD), False]
