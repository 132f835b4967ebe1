# SPDX-License-Identifier: Apache-2.0
"""Models and arguments as callers have them: a forward that writes, gradients of two dtypes, odd
parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _models import VOCABULARY, Before, plain, texts
from hullkit import TestTimeFinetuner
from torch import Tensor, nn

COUNTS = [1, 3, 2, 2]


class Masking(nn.Module):
    """It takes labels, and writes to them, as many do with padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        labels[labels == 0] = -100
        logits = self.head(self.embedding(input_ids))
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        return type("Output", (), {"loss": loss, "logits": logits})()


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_forward_that_writes_to_its_labels(as_dict: bool) -> None:
    example = torch.tensor([1, 2, 0, 4])
    given: Any = {"input_ids": example, "labels": example} if as_dict else example
    tuner = TestTimeFinetuner(Masking(), refresh_interval=1)
    tuner.adapt_([given], [3])
    assert example.tolist() == [1, 2, 0, 4]
    assert tuner.last_report is not None
    assert len(tuner.last_report.losses) == 3


@pytest.mark.parametrize("as_dict", [False, True])
def test_examples_are_those_of_the_call(as_dict: bool) -> None:
    """Also where a caller fills one buffer for the next prompt before he enters the block."""
    losses = []
    for refilled in (False, True):
        ids, labels = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 5, 6])
        given: Any = {"input_ids": ids, "labels": labels} if as_dict else ids
        tuner = TestTimeFinetuner(Masking())
        block = tuner.adapted([given], [2])
        if refilled:
            ids.fill_(VOCABULARY)  # no id
            labels.fill_(7)
        with block:
            assert tuner.last_report is not None
            losses.append(tuner.last_report.losses)
    assert losses[0] == losses[1]


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY, dtype=torch.bfloat16)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.embedding(ids).float()).bfloat16())
        return out


def test_gradients_of_two_dtypes_are_accumulated() -> None:
    model = TwoTypes()
    state = Before(model)
    tuner = TestTimeFinetuner(model, mode="accumulate", lr=0.1)
    with tuner.adapted(texts(), COUNTS):
        pairs = zip(model.parameters(), TwoTypes().parameters(), strict=True)
        changed = [not torch.equal(now, before) for now, before in pairs]
    assert all(changed)
    state.check()


def test_what_cannot_be_trained_is_named_before_anything_runs() -> None:
    model = plain()
    model.late = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"got a lazy one .*: 'late\.weight'"):
        TestTimeFinetuner(model).adapted(texts(), COUNTS)
    model = plain()
    model.wide = nn.Parameter(torch.randn(8, 8)[:, :4])
    with pytest.raises(ValueError, match=r"side by side .* got strides \(8, 1\): 'wide'"):
        TestTimeFinetuner(model).adapted(texts(), COUNTS)
    model = plain()
    model.turn = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"got torch\.complex64: 'turn'"):
        TestTimeFinetuner(model).adapted(texts(), COUNTS)
    tuner = TestTimeFinetuner(plain(), refresh_interval=1 << 25)
    with pytest.raises(ValueError, match=r"updates of examples\[0\] with one gradient: expected"):
        tuner.adapted(texts(1), [1 << 25])
    with pytest.raises(TypeError, match="lengths: expected integers, got int"):
        tuner.warmup(5)  # type: ignore[arg-type]
    meta = {"input_ids": texts(1)[0], "labels": texts(1)[0].to("meta")}
    with pytest.raises(ValueError, match=r"examples\[0\].* got one on the meta device"):
        tuner.adapted([meta], [1])


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.ones(VOCABULARY, 8)), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(nn.functional.embedding(ids, self.weight, sparse=True))
        return out


def test_sparse_gradients_are_named() -> None:
    model = Sparse()
    before = Before(model)
    with (
        pytest.raises(ValueError, match=r"dense gradients, got torch\.sparse_coo .* examples\[0\]"),
        TestTimeFinetuner(model).adapted(texts(), COUNTS),
    ):
        pass
    before.check()


def test_a_trained_parameter_without_elements() -> None:
    model = plain()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.empty = nn.Parameter(torch.ones(0))
    forward = model.forward
    model.forward = lambda ids: forward(ids) + model.empty.sum()
    TestTimeFinetuner(model).adapt_(texts(), COUNTS)
