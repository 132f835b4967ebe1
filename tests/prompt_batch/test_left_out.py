# SPDX-License-Identifier: Apache-2.0
"""Layers that not every pass reads."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY
from _prompts import DEVICE, PRECISIONS, batch_of, is_fresh, text
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

WIDTH = 16
LONG = 64
TARGET = ["always", "of_long", "never"]


class OfLong(nn.Module):
    """One layer is for long texts, another for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.always, self.of_long, self.never = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.always(x)
        if ids.shape[1] >= LONG:
            x = x + torch.tanh(self.of_long(x))
        logits: Tensor = self.head(x)
        return logits


def batch(**options: Any) -> hullkit.PromptBatch:
    return batch_of(OfLong().to(DEVICE).eval(), target=TARGET, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("later", ["used", "left out"])
def test_a_layer_that_some_passes_of_a_query_leave_out(precision: str, later: str) -> None:
    """Adam leaves it as it is, with a count of its own, which slots do not have."""
    of = batch(slots=1, precision=precision)
    short, long = text(8, 1), text(LONG + 20, 2)
    mixed = [short, long] if later == "used" else [long, short]
    takes = "examples.1. uses it" if later == "used" else "examples.1. leaves it out"
    alone = [hullkit.Query([ids], [4]) for ids in (long, short)]
    answers = list(of.map([alone[0], hullkit.Query(mixed, [1, 4]), *alone]))
    with pytest.raises(RuntimeError, match=f"of_long: expected a layer that takes part.*{takes}"):
        raise answers[1].error or AssertionError("no error")
    assert [answer.error for answer in answers if answer.place != 1] == [None] * 3
    assert answers[0].losses == answers[2].losses
    assert is_fresh(of, 0)


def test_a_layer_that_a_query_leaves_out_stays_fresh() -> None:
    """Also in a slot that has gradients of an earlier query for it."""
    of = batch(slots=2, capture=False)
    [earlier] = of.map([hullkit.Query([text(LONG, 2)], [4])])
    assert earlier.error is None
    [answer, _] = of.adapt_([hullkit.Query([text(8, 1)], [4]), hullkit.Query([], [])])
    assert answer.error is None
    trained, fresh = (of._factors.of_slot(k) for k in range(2))
    assert not torch.equal(trained["always"][1], fresh["always"][1])
    for name in ("of_long", "never"):
        assert all(map(torch.equal, trained[name], fresh[name]))
