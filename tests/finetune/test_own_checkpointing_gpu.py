# SPDX-License-Identifier: Apache-2.0
"""A model whose own forward calls torch.utils.checkpoint, on a CUDA device."""

from __future__ import annotations

import warnings

import pytest
import torch
from _models import COUNTS, VOCABULARY, texts
from hullkit.finetune import TestTimeFinetuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + checkpoint(self.layers, x, use_reentrant=False)
        y: Tensor = self.head(x)
        return y


def test_the_error_names_the_way_out() -> None:
    torch.manual_seed(0)
    model = Checkpointed().cuda()
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the capture that was given up
        with (
            pytest.raises(RuntimeError, match="give fuse=False"),
            TestTimeFinetuner(model).adapted(texts(), COUNTS),
        ):
            pass
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        with TestTimeFinetuner(model, fuse=False).adapted(texts(), COUNTS):
            assert not torch.equal(next(model.parameters()), before.pop(0))
