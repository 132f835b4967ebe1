# SPDX-License-Identifier: Apache-2.0
"""A `Score` comes with a pass of the others where slots share passes, and is called elsewhere."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY, llama
from _prompts import DEVICE, ROUNDING, TOGETHER, batch_of, text
from hullkit.prompt_batch import Score
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The ids of scores that are called."""
    found: list[Tensor] = []
    call = Score.__call__

    def noted(self: Score, model: nn.Module) -> float:
        found.append(self.ids)
        return call(self, model)

    monkeypatch.setattr(Score, "__call__", noted)
    return found


def query(seed: int, count: int = 3, long: int = 20, scored: int = 12) -> hullkit.Query:
    return hullkit.Query([text(long, seed)], [count], Score(text(scored, 1000 + seed)))


def values(answers: list[hullkit.Answer]) -> list[float]:
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return [answer.value for answer in answers]


def by_calls(queries: list[hullkit.Query]) -> list[float]:
    """Each alone; a `then` of another class is called."""
    asked = [q._replace(then=lambda model, q=q: Score.__call__(q.then, model)) for q in queries]
    return values([*batch_of(llama().to(DEVICE), 1, **TOGETHER).map(asked)])


def test_scores_come_with_passes(called: list[Tensor]) -> None:
    queries = [query(seed, count=1 + seed % 4) for seed in range(9)]
    wanted = by_calls(queries)
    assert len(called) == 9
    for slots in (1, 3, 4):
        called.clear()
        answers = [*batch_of(llama().to(DEVICE), slots, **TOGETHER).map(queries)]
        assert values(answers) == pytest.approx(wanted, rel=ROUNDING)
        assert not called
        assert [len(a.losses) for a in answers] == [(1 + seed % 4 + 1) // 2 for seed in range(9)]


def test_a_pass_that_only_scores_has_to_score_a_quarter_of_the_slots(called: list[Tensor]) -> None:
    queries = [query(seed, count=1) for seed in range(10)]
    wanted = by_calls(queries)
    for number, alone in ((9, 1), (10, 0)):  # a pass of eight, then of the rest
        called.clear()
        found = values([*batch_of(llama().to(DEVICE), 8, **TOGETHER).map(queries[:number])])
        assert found == pytest.approx(wanted[:number], rel=ROUNDING)
        assert len(called) == alone


def test_no_pass_becomes_longer_for_a_score(called: list[Tensor]) -> None:
    """The text to score is longer than those of its query. A neighbour's may be as long."""
    longer = query(0, count=1, long=20, scored=60)
    for other, alone in ((query(1, count=9), 1), (query(1, count=9, long=60), 0)):
        wanted = by_calls([longer, other])
        called.clear()
        found = values([*batch_of(llama().to(DEVICE), 2, **TOGETHER).map([longer, other])])
        assert found == pytest.approx(wanted, rel=ROUNDING)
        assert len(called) == alone


def test_full_float32_and_other_callables_are_called(called: list[Tensor]) -> None:
    class Own(Score):
        pass

    own = [query(0), query(1)]
    values([*batch_of(llama().to(DEVICE), 2).map(own)])
    assert len(called) == 2
    batch = batch_of(llama().to(DEVICE), 2, **TOGETHER)
    values([*batch.map([q._replace(then=Own(text(12, 0))) for q in own])])
    assert len(called) == 4


def test_a_slot_keeps_what_it_has_learned_while_it_is_scored() -> None:
    queries = [query(seed, count=3 + seed) for seed in range(3)]
    batch = batch_of(llama().to(DEVICE), 3, **TOGETHER)
    scores = values(batch.adapt_(queries))
    params = batch._factors.params.clone()
    batch.adapt_([q._replace(then=None) for q in queries])
    assert torch.equal(batch._factors.params, params)
    for k, of in enumerate(queries):
        assert of.then is not None
        with batch.slot(k) as model:
            assert of.then(model) == pytest.approx(scores[k], rel=ROUNDING)


def improbable(token: int) -> nn.Module:
    """A model that gives a token no probability."""
    model = llama()
    model.lm_head = nn.Linear(model.config.hidden_size, VOCABULARY)
    with torch.no_grad():
        model.lm_head.bias[token] = -torch.inf
    return model.to(DEVICE)


def test_a_score_that_is_not_finite_is_its_own_error(called: list[Tensor]) -> None:
    ids = torch.arange(2, 14)
    fine = hullkit.Query([ids], [3], Score(ids[:8]))
    bad = fine._replace(then=Score(torch.tensor([1, 0, 3])))
    batch = batch_of(improbable(0), 2, **TOGETHER)
    wanted = values([*batch.map([fine])])
    first, second = batch.map([bad, fine])
    assert not called
    assert type(first.error) is FloatingPointError
    assert str(first.error) == "ids: expected a finite loss, got inf"
    assert first.value is None
    assert len(first.losses) == 2
    assert values([second]) == pytest.approx(wanted, rel=ROUNDING)


@pytest.mark.parametrize("ids", [text(5, 0) + VOCABULARY, text(1, 0), text(5, 0).float(), [1, 2]])
def test_bad_ids_are_called(ids: Any, called: list[Tensor]) -> None:
    batch = batch_of(llama().to(DEVICE), 1, **TOGETHER)
    [answer] = batch.map([query(0)._replace(then=Score(ids))])
    assert len(called) == 1
    assert "ids: expected" in str(answer.error)
    assert len(answer.losses) == 2


def test_labels_without_a_logit_are_their_querys_errors(called: list[Tensor]) -> None:
    """The first pass shows how many logits there are, though the model does not tell."""
    model: nn.Module = llama()
    model.lm_head = nn.Linear(model.config.hidden_size, VOCABULARY // 2)
    model.get_output_embeddings = lambda: None
    ids, bad = text(20, 0) % (VOCABULARY // 2), torch.tensor([1, VOCABULARY - 1])
    fine = hullkit.Query([ids], [1], Score(ids[:9]))
    queries = [fine._replace(then=Score(bad)), fine, fine._replace(examples=[bad])]
    first, second, third = batch_of(model.to(DEVICE), 2, **TOGETHER).map(queries)
    assert f"ids: expected ids in [0, {VOCABULARY // 2})" in str(first.error)
    assert second.error is None
    assert f"examples[0]: expected ids in [0, {VOCABULARY // 2})" in str(third.error)
    assert len(called) == 1


def test_a_score_without_memory_for_a_pass_is_called(
    called: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [query(seed) for seed in range(2)]
    wanted = by_calls(queries)
    called.clear()
    batch = batch_of(llama().to(DEVICE), 2, **TOGETHER)
    step = batch.step

    def lacking(tokens: Tensor, first: int, group: list[Any]) -> Any:
        if any(run is not None and run.scored is not None for run in group):
            raise torch.OutOfMemoryError("no more")
        return step(tokens, first, group)

    monkeypatch.setattr(batch, "step", lacking)
    assert values([*batch.map(queries)]) == pytest.approx(wanted, rel=ROUNDING)
    assert len(called) == 2
