# SPDX-License-Identifier: Apache-2.0
"""A `Score` comes with a pass of the others where slots share passes on a GPU, else it is called.

The CPU takes part with the GPU's rule.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY, llama
from _prompts import DEVICE, PRECISIONS, ROUNDING, TOGETHER, batch_of, text
from _signals import AtEvery, raising
from hullkit.language_model import interface
from hullkit.prompt_batch import Generate, Score, stream
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]


IDS = text(9, 0)


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


def shared(slots: int, model: nn.Module | None = None) -> hullkit.PromptBatch:
    batch = batch_of(model or llama().to(DEVICE), slots, **TOGETHER)
    assert batch._passes.scores == (DEVICE.type == "cuda")
    batch._passes.scores = True
    return batch


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
    return values([*shared(1).map(asked)])


def test_scores_come_with_passes(called: list[Tensor]) -> None:
    queries = [query(seed, count=1 + seed % 4) for seed in range(9)]
    wanted = by_calls(queries)
    assert len(called) == 9
    for slots in (1, 2, 3):
        called.clear()
        answers = [*shared(slots).map(queries)]
        assert values(answers) == pytest.approx(wanted, rel=ROUNDING)
        assert not called
        assert [len(a.losses) for a in answers] == [(1 + seed % 4 + 1) // 2 for seed in range(9)]


def test_a_pass_that_only_scores_scores_more_than_a_quarter_of_the_slots(
    called: list[Tensor],
) -> None:
    queries = [query(seed, count=1) for seed in range(11)]
    wanted = by_calls(queries)
    for number, alone in ((9, 1), (10, 2), (11, 0)):  # a pass of eight, then of the rest
        called.clear()
        found = values([*shared(8).map(queries[:number])])
        assert found == pytest.approx(wanted[:number], rel=ROUNDING)
        assert len(called) == alone


def test_no_pass_becomes_longer_for_a_score(called: list[Tensor]) -> None:
    """What counts are the texts of the next pass, and the query's own if no other learns."""
    of_20 = query(0, count=1, long=20, scored=60)
    of_60 = of_20._replace(examples=[text(60, 0), text(20, 1)], counts=[1, 1])
    unused = of_60._replace(counts=[0, 1])
    other = query(1, count=9)
    for queries, alone in (
        ([of_20, other], 1),
        ([of_20, query(1, count=9, long=60)], 0),
        ([of_60, other], 1),
        ([of_60], 0),
        ([unused], 1),
    ):
        wanted = by_calls(queries)
        called.clear()
        found = values([*shared(2).map(queries)])
        assert found == pytest.approx(wanted, rel=ROUNDING)
        assert len(called) == alone


def test_full_float32_and_other_callables_are_called(called: list[Tensor]) -> None:
    class Own(Score):
        pass

    own = [query(0), query(1)]
    full = batch_of(llama().to(DEVICE), 2)
    assert not full._passes.scores
    values([*full.map(own)])
    assert len(called) == 2
    batch = shared(2)
    values([*batch.map([q._replace(then=Own(text(12, 0))) for q in own])])
    assert len(called) == 4


@pytest.mark.parametrize("what", ["no scores", "one row"])
def test_what_shares_no_passes_is_called(
    what: str, called: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, and where there is memory for one text at a time."""
    batch = shared(2)
    batch._passes.scores = what != "no scores"
    if what == "one row":
        monkeypatch.setattr(batch._room, "rows", lambda length: 1)
    values([*batch.map([query(0), query(1)])])
    assert len(called) == 2


def test_a_slot_keeps_what_it_has_learned_while_it_is_scored() -> None:
    queries = [query(seed, count=3 + seed) for seed in range(3)]
    batch = shared(3)
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
    batch = shared(2, improbable(0))
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
    batch = shared(1)
    [answer] = batch.map([query(0)._replace(then=Score(ids))])
    assert len(called) == 1
    assert "ids: expected" in str(answer.error)
    assert len(answer.losses) == 2


@pytest.mark.parametrize("told", [True, False])
def test_labels_without_a_logit_are_their_querys_errors(told: bool, called: list[Tensor]) -> None:
    """Of the first queries too, and where the model does not tell how many logits there are."""
    model: nn.Module = llama()
    model.lm_head = nn.Linear(model.config.hidden_size, VOCABULARY // 2)
    if not told:
        model.get_output_embeddings = lambda: None
    ids, bad = text(20, 0) % (VOCABULARY // 2), torch.tensor([1, VOCABULARY - 1])
    fine = hullkit.Query([ids], [1], Score(ids[:9]))
    queries = [fine._replace(then=Score(bad)), fine._replace(examples=[ids, bad], counts=[1, 1])]
    batch = shared(2, model.to(DEVICE))
    for _ in range(2):
        called.clear()
        first, second, third = batch.map([*queries, fine])
        assert f"ids: expected ids in [0, {VOCABULARY // 2})" in str(first.error)
        assert f"examples[1]: expected ids in [0, {VOCABULARY // 2})" in str(second.error)
        assert third.error is None
        assert len(called) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_memory_for_the_ids_of_all_queries(precision: str) -> None:
    """Queries are read ahead of the calls that score and continue them."""
    texts = [text(9, seed) for seed in range(6)]
    thens: tuple[Any, ...] = (
        Score,
        lambda ids: Generate(ids, max_new_tokens=2, do_sample=True, top_k=1),
    )

    def queries(of: Callable[[Tensor], Tensor]) -> Iterator[hullkit.Query]:
        for i, ids in enumerate(texts):
            yield hullkit.Query([of(ids)], [2], thens[i % 2](of(ids)))

    batch = batch_of(llama().to(DEVICE), 2, precision=precision)
    memory = torch.empty_like(texts[0])
    apart, together = ([*batch.map(queries(of))] for of in (Tensor.clone, memory.copy_))
    assert list(map(str, values(together))) == list(map(str, values(apart)))


@pytest.mark.parametrize("what", ["examples", "scored"])
def test_what_the_caller_writes_to_ids_later_is_not_seen(what: str) -> None:
    """The first query's slot takes the third while the second learns, or waits to be scored."""
    first, second, third = (query(seed, count=1) for seed in range(3))
    if what == "examples":
        second = second._replace(counts=[3])
    wanted = by_calls([second])
    [example], then = second.examples, second.then
    assert isinstance(then, Score)

    def spoiling() -> Iterator[hullkit.Query]:
        yield first._replace(then=None)
        yield second
        (example if what == "examples" else then.ids).fill_(1 << 40)
        yield third

    answers = [*shared(2).map(spoiling())]
    assert values(answers)[1] == pytest.approx(wanted[0], rel=ROUNDING)


def test_a_score_without_memory_for_a_pass_is_called(
    called: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [query(seed) for seed in range(2)]
    wanted = by_calls(queries)
    called.clear()
    batch = shared(2)
    step = batch._step

    def lacking(tokens: Tensor, first: int, group: list[Any]) -> Any:
        if any(run is not None and run.scored is not None for run in group):
            raise torch.OutOfMemoryError("no more")
        return step(tokens, first, group)

    monkeypatch.setattr(batch, "_step", lacking)
    assert values([*batch.map(queries)]) == pytest.approx(wanted, rel=ROUNDING)
    assert len(called) == 2


def test_a_signal_while_a_score_is_checked_is_not_lost() -> None:
    batch = shared(1)
    own = hullkit.Query([IDS], [1], Score(IDS))
    seen: list[bool] = []

    def run() -> None:
        seen.clear()
        try:
            seen.extend(type(answer.error) is TimeoutError for answer in batch.map([own]))
        except TimeoutError:
            seen.append(True)

    functions = ("_to_score", "_ids", "check_token_ids", "check_predicted")
    at_every = AtEvery(lambda: signal.raise_signal(signal.SIGALRM), (stream, interface), functions)
    with raising(signal.SIGALRM, TimeoutError):
        at_every.run(run, lambda sent: pytest.fail("lost") if seen != [sent] else None)
    assert at_every.where >= {"_to_score", "_ids"}


@pytest.mark.parametrize("given", [{}, {"use_cache": True}])
def test_what_needs_logits_alone_asks_for_no_cache(given: dict[str, bool]) -> None:
    """It would hold the keys and values of all layers at once."""
    model = llama().to(DEVICE)
    found: list[Any] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        found.append(out.past_key_values)

    batch = batch_of(model, 1)
    model.register_forward_hook(note)
    with batch.slot(0):
        Score(IDS)(model)
    batch(IDS[None].to(DEVICE), **given)
    assert found[0] is None
    assert (found[1] is None) == (not given)
