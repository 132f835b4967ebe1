# SPDX-License-Identifier: Apache-2.0
"""Captured passes whose updates multiply: that they do, and what they do not survive."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from hullkit.native import kernels
from torch import Tensor, nn

pytestmark = pytest.mark.gpu
WIDTH, TOKENS = 256, 64


class InPlace(torch.autograd.Function):
    """x, whose backward half writes over the gradient that it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.mul_(2.0)


class Branches(nn.Module):
    """Two layers whose outputs are added up, so that both get the same gradient."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, WIDTH)
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.writes = writes

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        other: Tensor = torch.tanh(self.first(x))
        if self.writes:
            other = InPlace.apply(self.first(x))  # type: ignore[no-untyped-call]
        logits: Tensor = self.head(torch.tanh(self.second(x) + other))
        return logits


def adapted(writes: bool, capture: bool | None) -> tuple[hullkit.TestTimeFinetuner, list[Tensor]]:
    model = Branches(writes).to("cuda", torch.bfloat16)
    tuner = hullkit.TestTimeFinetuner(model, lr=1e-2, capture=capture, rounding="nearest")
    ids = torch.arange(TOKENS) % 32
    tuner.adapt_([ids], [6])
    return tuner, [p.detach().float() for p in model.parameters()]


@pytest.fixture(autouse=True)
def usable() -> None:
    if not kernels.adam_product_usable(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("no GPU that the kernel runs on")


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_captured_pass_multiplies_in_its_updates() -> None:
    tuner, _ = adapted(False, True)
    ids = torch.arange(TOKENS) % 32
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        tuner.adapt_([ids], [2])
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("adam_product" in name for name in names)
    assert tuner.last_report is not None
    assert tuner.last_report.path == "captured"


@pytest.mark.filterwarnings("ignore:hullkit. passes are not captured")
def test_a_gradient_that_is_written_to_before_its_update() -> None:
    """Autograd's own products have read it by then; those of updates have not."""
    tuner, found = adapted(True, None)
    assert tuner.last_report is not None
    assert tuner.last_report.path == "eager"
    assert "nobody writes to in the backward pass" in str(tuner.last_report.reason)
    _, wanted = adapted(True, False)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
