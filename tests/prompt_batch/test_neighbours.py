# SPDX-License-Identifier: Apache-2.0
"""Models whose texts cannot simply be padded, or cannot share a pass."""

from __future__ import annotations

import math
from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY
from _prompts import DEVICE, ROUNDING, TOGETHER, batch_of, query, text
from hullkit.prompt_batch import Score
from hullkit.prompt_batch.neighbours import difference
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]


class Mixing(nn.Module):
    """A small model that adds a mean of all tokens' vectors: over `dims` of (rows, tokens)."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.inner, self.head = nn.Linear(12, 12), nn.Linear(12, VOCABULARY)
        self.dims = dims
        self.lengths: list[int] = []

    def forward(self, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.lengths.append(ids.shape[1])
        x = self.inner(self.embedding(ids))
        out: Tensor = self.head(x + x.mean(self.dims, keepdim=True) if self.dims else x)
        return out


def test_texts_that_feel_padding_share_passes_with_those_as_long() -> None:
    model = Mixing(1).to(DEVICE)
    queries = [query(seed) for seed in range(5)]
    queries[3] = query(1)  # as long as another
    options: dict[str, Any] = {"target": ["inner"], "capture": False} | TOGETHER
    alone = [a.losses for a in batch_of(model, 1, **options).map(queries)]
    model.lengths.clear()
    batch = batch_of(model, 3, **options)
    for answer, losses in zip(batch.map(queries), alone, strict=True):
        assert answer.losses == pytest.approx(losses, rel=ROUNDING)
    own = {len(ids) for q in queries for ids in q.examples}
    assert set(model.lengths) == own
    assert len(model.lengths) < sum(len(losses) for losses in alone)  # some shared a pass


class TokensFirst(nn.Module):
    """Its layers get (T, R, C), as torch's own encoder layers by default, or sorted tokens."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, VOCABULARY)
        self.order = order

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.order == "tokens first":
            x = self.inner(x.transpose(0, 1)).transpose(0, 1)
        elif self.order == "tokens first, flat":
            x = self.inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, ids.shape[::-1])
            x = x.transpose(0, 1)
        else:
            places = ids.flatten().argsort(stable=True)
            x = torch.empty_like(x.flatten(0, 1)).index_copy(
                0, places, self.inner(x.flatten(0, 1)[places])
            )
            x = x.view(*ids.shape, -1)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("order", ["tokens first", "tokens first, flat", "sorted"])
def test_rows_that_layers_get_in_another_order_are_refused(order: str) -> None:
    """They would go through the factors of other slots. Only with factors does it show."""
    model = TokensFirst(order).to(DEVICE)
    options: dict[str, Any] = {"target": ["inner"], "capture": False}
    queries = [hullkit.Query([text(16, seed)], [2]) for seed in range(2)]
    with pytest.raises(ValueError, match="one after the other in all layers"):
        next(batch_of(model, 2, **options, **TOGETHER).map(queries))
    batch = batch_of(model, 2, **options)  # in full float32 no pass has two rows
    assert [a.error for a in batch.adapt_(queries)] == [None] * 2
    before = [factor.clone() for factor in batch._factors.of_slot(1)["inner"]]
    with pytest.raises(ValueError, match="one after the other in all layers"):
        batch(torch.stack([text(16, 5), text(16, 6)]).to(DEVICE))
    after = batch._factors.of_slot(1)["inner"]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


class InnerGradient(nn.Module):
    """Its forward differentiates `inner` by its input; the loss depends on the result alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12)
        self.outer, self.head = nn.Linear(12, 12), nn.Linear(12, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).detach()
        with torch.enable_grad():
            leaf = x.requires_grad_()
            (g,) = torch.autograd.grad(self.inner(leaf).square().sum(), leaf)
        out: Tensor = self.head(self.outer(x.detach() + g.detach()))
        return out


def test_a_gradient_that_a_forward_takes_for_itself_trains_nothing() -> None:
    model = InnerGradient().to(DEVICE)
    batch = batch_of(model, 1, target=["inner", "outer"], capture=False)
    before = {name: [f.clone() for f in fs] for name, fs in batch._factors.of_slot(0).items()}
    [answer] = batch.adapt_([query(0)])
    assert answer.error is None
    after = batch._factors.of_slot(0)
    same = {n: all(torch.equal(*p) for p in zip(before[n], after[n], strict=True)) for n in after}
    assert same == {"inner": True, "outer": False}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_gradient_by_an_input_of_an_adapted_model(precision: str) -> None:
    """Inside of a block, as PEFT's adapter gives it. No factor learns."""

    class Embedded(Mixing):
        def forward(self, ids: Tensor | None = None, x: Tensor | None = None) -> Tensor:
            x = self.embedding(ids) if x is None else x
            out: Tensor = self.head(torch.tanh(self.inner(x)))
            return out

    model = Embedded().to(DEVICE)
    batch = batch_of(model, 2, target=["inner", "head"], capture=False, precision=precision)
    batch.adapt_([query(0), query(1)])
    x = torch.randn(1, 5, 12, device=DEVICE, requires_grad=True)
    direction = torch.randn(1, 5, VOCABULARY, device=DEVICE)
    with batch.slot(1) as adapted:
        (found,) = torch.autograd.grad(adapted(x=x), x, direction.to(adapted(x=x).dtype))
    h = x
    for name, act in (("inner", torch.tanh), ("head", lambda y: y)):
        a, b = batch._factors.of_slot(1)[name]
        layer: Any = model.get_submodule(name)
        h = act(layer(h) + batch._forwards._scale * (h @ a.T) @ b.T)
    (wanted,) = torch.autograd.grad(h, x, direction)
    bound = 1e-5 if precision == "float32" else 0.03
    assert found.dtype is x.dtype
    assert float((found - wanted).norm() / wanted.norm()) < bound


def test_rows_that_change_each_other_are_refused() -> None:
    model = Mixing(0, 1).to(DEVICE)
    batch = batch_of(model, 2, target=["inner"], **TOGETHER)
    with pytest.raises(ValueError, match="rows of a batch that do not change each other"):
        next(batch.map([query(0)]))
    for batch in (
        batch_of(model, 1, capture=False, **TOGETHER),
        batch_of(model, 2, target=["inner"]),  # in full float32 no pass has two rows
    ):
        assert [a.error for a in batch.map([query(0)])] == [None]
    with pytest.raises(ValueError, match="rows of a batch that do not change each other"):
        batch(torch.ones(2, 5, dtype=torch.int64, device=DEVICE))  # a call has them in one pass


def test_a_first_text_of_zeros_hides_nothing() -> None:
    zeros = torch.zeros(6, dtype=torch.int64)
    batch = batch_of(Mixing(0).to(DEVICE), 2, target=["inner"], **TOGETHER)
    with pytest.raises(ValueError, match="rows of a batch that do not change each other"):
        next(batch.map([([zeros], [1])]))
    batch = batch_of(Mixing(1).to(DEVICE), 2, target=["inner"], capture=False, **TOGETHER)
    assert not batch._pads(zeros)


def test_an_offset_of_all_logits_hides_nothing_and_its_rounding_is_none() -> None:
    def shifted(*dims: int) -> nn.Module:
        model = Mixing(*dims)
        with torch.no_grad():
            model.head.bias.add_(300.0)
        return model.to(DEVICE)

    options: dict[str, Any] = {"target": ["inner"], "capture": False} | TOGETHER
    assert not batch_of(shifted(1), 2, **options)._pads(text(9, 0))
    with pytest.raises(ValueError, match="rows of a batch that do not change each other"):
        batch_of(shifted(0, 1), 2, **options)._pads(text(9, 0))
    assert batch_of(shifted().to(torch.bfloat16), 2, **options)._pads(text(9, 0))
    logits = torch.randn(5, 40) + 300.0
    assert difference(logits, logits.bfloat16(), torch.float32) > 0.3
    assert difference(logits, logits.bfloat16(), torch.bfloat16) == 0.0
    assert difference(logits, logits + 7.0, torch.float32) < 1e-4
    assert math.isnan(difference(logits, logits * math.nan, torch.float32))


def test_a_model_with_a_state_is_padded() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2,
        time_step_rank=4,
    )  # fmt: skip
    model: Any = MambaForCausalLM(config).to(DEVICE)
    queries = [query(seed) for seed in range(3)]
    # An eps above the noise of gradients that are nearly zero, which Adam makes whole steps of.
    options: dict[str, Any] = {"target": ["in_proj", "x_proj", "out_proj"], "eps": 1e-5}
    options |= {"capture": False} | TOGETHER
    alone = [a.losses for a in batch_of(model, 1, **options).map(queries)]
    together = [a.losses for a in batch_of(model, 3, **options).map(queries)]
    for ours, wanted in zip(together, alone, strict=True):
        assert ours == pytest.approx(wanted, rel=max(1e-4, ROUNDING))


def test_a_model_that_feels_padding_a_little_is_not_padded() -> None:
    """A part of a hundredth is too much for a loss, though rounding of halves may be so large."""

    class Slightly(Mixing):
        def forward(self, ids: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self.lengths.append(ids.shape[1])
            x = self.inner(self.embedding(ids))
            out: Tensor = self.head(x + 0.1 * x.mean(1, keepdim=True))
            return out

    queries = [hullkit.Query([text(n, n)], [2], Score(text(n, n))) for n in (7, 40)]
    options: dict[str, Any] = {"target": ["inner"], "capture": False}
    batch = batch_of(Slightly(1).to(DEVICE), 2, **options, **TOGETHER)
    alone = [*batch_of(Slightly(1).to(DEVICE), 1, **options).map(queries)]
    for answer, own in zip(batch.map(queries), alone, strict=True):
        assert answer.losses == pytest.approx(own.losses, rel=ROUNDING)
    assert not batch._pads(text(9, 0))


class Learned(Mixing):
    """Its positions are a parameter, as minGPT's are: nothing tells how many there are. Or they
    are a table, which does."""

    def __init__(self, positions: int, table: bool) -> None:
        super().__init__()
        if table:
            self.wpe = nn.Embedding(positions, 12)
        self.positions = self.wpe.weight if table else nn.Parameter(torch.randn(positions, 12))

    def forward(self, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.lengths.append(ids.shape[1])
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        out: Tensor = self.head(self.inner(x))
        return out


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("positions", [21, 37])
def test_texts_are_padded_no_further_than_the_model_takes(positions: int, table: bool) -> None:
    lengths = (20, positions, 9, 9, positions - 1)
    queries = [hullkit.Query([text(n, i)], [2]) for i, n in enumerate(lengths)]
    options: dict[str, Any] = {"target": ["inner"], "capture": False}
    model = Learned(positions, table).to(DEVICE)
    assert model.embedding.num_embeddings > 20
    answers = [*batch_of(model, 2, **options, **TOGETHER).map(queries)]
    assert [a.error for a in answers] == [None] * len(queries)
    assert max(model.lengths) <= positions
    own = [*batch_of(Learned(positions, table).to(DEVICE), 1, **options).map(queries)]
    for ours, theirs in zip(answers, own, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=ROUNDING)


class Sometimes(Mixing):
    """Its second layer takes part for one token id only, or sees a part of the tokens."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.second = nn.Linear(12, 12)
        self.part = part

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embedding(ids)))
        if self.part:
            x = x + self.second(x[:, ::2]).repeat_interleave(2, 1)[:, : ids.shape[1]]
        elif int(ids[0, 0]) == 7:
            x = x + self.second(x)
        out: Tensor = self.head(x)
        return out


def test_a_layer_that_took_no_part_in_a_pass_learns_nothing_from_the_pass_before() -> None:
    first, then = text(9, 0), text(9, 1)
    first[0], then[0] = 7, 8
    model = Sometimes(False).to(DEVICE)
    batch = hullkit.PromptBatch(model, slots=1, rank=2, capture=False, refresh_interval=1)
    batch.adapt_([([first], [1])])
    once = batch._factors.of_slot(0)["second"][1].clone()
    assert once.any()
    batch.adapt_([([then], [2])])
    assert not batch._factors.of_slot(0)["second"][1].any()  # B began with 0


def test_a_layer_that_sees_a_part_of_the_tokens_is_refused() -> None:
    batch = hullkit.PromptBatch(Sometimes(True).to(DEVICE), slots=2, capture=False, **TOGETHER)
    with pytest.raises(RuntimeError, match="second: expected a row for each"):
        next(batch.map([([text(9, 0)], [1], Score(text(9, 0)))]))
