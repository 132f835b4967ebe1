# SPDX-License-Identifier: Apache-2.0
"""What users do to a batch and its queries that cannot work says so, and loses no answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import hullkit
import pytest
import torch
from _models import llama
from _prompts import DEVICE, TOGETHER, batch_of, is_fresh, text

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

QUERY = hullkit.Query([text(9, 0)], [2])


def test_a_query_is_no_iterable_of_queries() -> None:
    batch = batch_of(llama().to(DEVICE), 8)
    with pytest.raises(TypeError, match="queries: expected an iterable of queries, got Query"):
        next(batch.map(QUERY))
    with pytest.raises(TypeError, match="queries: expected an iterable of queries, got int"):
        next(batch.map(5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="queries: expected a sequence, got Query"):
        batch.adapt_(QUERY)
    assert [a.error for a in batch.map([QUERY])] == [None]  # it is free


def test_a_tuple_that_is_too_short_is_told_its_length() -> None:
    [answer] = batch_of(llama().to(DEVICE), 1).map([([text(9, 0)],)])
    assert str(answer.error).endswith("(examples, counts, then), got tuple of 1")


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_error_of_the_iterable_comes_after_the_answers_before_it(number: int) -> None:
    def failing() -> Iterator[hullkit.Query]:
        yield from [QUERY] * number
        raise OSError("disk")

    batch = batch_of(llama().to(DEVICE), 3, **TOGETHER)
    answers: list[hullkit.Answer] = []
    with pytest.raises(OSError, match="disk"):
        answers.extend(batch.map(failing()))
    assert [(a.place, a.error) for a in answers] == [(i, None) for i in range(number)]
    assert [a.error for a in batch.map([QUERY])] == [None]


def test_slots_are_fresh_after_a_sequence_that_raises() -> None:
    class Failing(list[hullkit.Query]):
        def __iter__(self) -> Iterator[hullkit.Query]:
            yield QUERY
            raise OSError("disk")

    batch = batch_of(llama().to(DEVICE), 2, **TOGETHER)
    with pytest.raises(OSError, match="disk"):
        batch.adapt_(Failing([QUERY, QUERY]))
    assert all(is_fresh(batch, slot) for slot in range(2))


def test_answers_that_are_ready_do_not_wait_for_the_next_query() -> None:
    answers: list[hullkit.Answer] = []

    def live() -> Iterator[hullkit.Query]:
        yield QUERY
        yield QUERY
        assert [a.place for a in answers] == [0, 1]
        yield QUERY

    for answer in batch_of(llama().to(DEVICE), 2, **TOGETHER).map(live()):
        answers.append(answer)
    assert [a.error for a in answers] == [None] * 3


def replaced(model: Any) -> None:
    model.model.layers[0].mlp = deepcopy(model.model.layers[0].mlp)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced, r"mlp\.gate_proj: expected the layer of which the batch was made, got another"),
        (lambda model: model.half(), "expected a weight as when the batch was made, torch.float32"),
        (lambda model: model.to("meta"), "got torch.float32 on meta"),
    ],
)
def test_a_model_that_is_another_by_now_is_refused(
    change: Callable[[Any], Any], words: str
) -> None:
    model = llama().to(DEVICE)
    batch = batch_of(model, 1)
    batch.adapt_([QUERY])
    ids = text(5, 0)[None].to(DEVICE)
    batch(ids)
    change(model)
    uses: list[Callable[[], Any]] = [
        lambda: batch(ids),
        lambda: batch.generate(ids, max_new_tokens=1),
        lambda: batch.adapt_([QUERY]),
        lambda: batch.slot(0).__enter__(),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=words):
            use()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_refused(whole: bool) -> None:
    model: Any = llama()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"model: expected one that torch\.compile has not"):
        batch_of(model, 1)
