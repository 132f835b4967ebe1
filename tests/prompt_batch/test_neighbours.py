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
