# SPDX-License-Identifier: Apache-2.0
"""Which passes of a batch are recorded, and what a recorded pass reads."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from _gpu import count_recordings
from _models import VOCABULARY, llama
from _prompts import batch_of, query
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]

WIDTH = 16


class Keeping(nn.Module):
    """It adds a table to its embeddings, and puts a copy in the place of the table."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        table = torch.randn(WIDTH, device="cuda")
        if buffer:
            self.register_buffer("table", table)
        else:
            self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.table
        self.table = self.table.clone()
        logits: Tensor = self.head(x + self.layer(x))
        return logits


def batch(*, buffer: bool, **options: Any) -> hullkit.PromptBatch:
    return batch_of(Keeping(buffer=buffer).cuda().eval(), 1, target=["layer"], **options)


def test_a_pass_that_replaces_a_buffer_is_not_recorded() -> None:
    """Its graph would read the buffer's first memory."""
    with pytest.raises(RuntimeError, match="can be recorded: forward replaces a buffer"):
        list(batch(buffer=True, capture=True).map([query(0)]))
    ours = batch(buffer=True)
    with pytest.warns(UserWarning, match="passes run eagerly.*forward replaces a buffer"):
        [answer] = ours.map([query(0)])
    assert (answer.error, ours.path) == (None, "eager")
    [again] = ours.map([query(0)])  # no second attempt, no second warning
    assert again == answer


def test_a_graph_keeps_the_attributes_that_it_reads() -> None:
    [wanted] = batch(buffer=False, capture=False).map([query(0)])
    ours = batch(buffer=False, capture=True)
    list(ours.map([query(0)]))
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
        others = [torch.full((WIDTH,), float("nan"), device="cuda") for _ in range(1000)]
    [answer] = ours.map([query(0)])
    assert (answer.error, ours.path, len(others)) == (None, "captured", 1000)
    assert answer.losses == pytest.approx(wanted.losses, rel=1e-5)


def test_passes_are_recorded_again_for_other_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = count_recordings(monkeypatch)
    model = llama().to("cuda")
    batch = batch_of(model, 1, capture=True)
    batch.adapt_([query(0)])
    once = len(recorded)
    batch.adapt_([query(0)])
    assert len(recorded) == once > 0
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    batch.adapt_([query(0)])
    assert len(recorded) == 2 * once
