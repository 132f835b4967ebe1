# SPDX-License-Identifier: Apache-2.0
"""Captured passes of forwards that make tensors on the host, and why others are not captured."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import COUNTS, Before, PlainLM, distance, state, texts
from hullkit.finetune import TestTimeFinetuner
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]


class Forward(PlainLM):
    """Its logits go through a function."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.number = 0
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        return self.change(self, super().forward(ids))


def scaled(model: Any, x: Tensor) -> Tensor:
    return x * torch.tensor([0.5]).to(x.device)


def built_there(model: Any, x: Tensor) -> Tensor:
    return x * torch.tensor([0.5], device=x.device) + x.new_tensor([0.25])


def masked(model: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[-2:], dtype=torch.bool).tril().to(x.device)
    return torch.where(mask, x, torch.tensor(-1.0))


def picked(model: Any, x: Tensor) -> Tensor:
    return torch.cat([x[..., [0, 2, 1]], x[..., 3:]], -1)


def counted(model: Any, x: Tensor) -> Tensor:
    model.number += 1
    return x + torch.tensor([float(model.number)]).to(x.device)


def asked(model: Any, x: Tensor) -> Tensor:
    return x / x.detach().abs().max().item()


def branched(model: Any, x: Tensor) -> Tensor:
    return x * 0.5 if x.detach().sum() > 0 else x * 0.25


def buffered(model: Any, x: Tensor) -> Tensor:
    return x * model.on_the_host.to(x.device)


def built(change: Callable[[Any, Tensor], Tensor]) -> Forward:
    model = Forward(change).cuda()
    if change is buffered:
        model.register_buffer("on_the_host", torch.tensor([0.5]))
    return model


@pytest.mark.parametrize("change", [scaled, built_there, masked, picked])
def test_host_tensors_are_captured(change: Callable[[Any, Tensor], Tensor]) -> None:
    model = built(change)
    before = Before(model)
    captured = TestTimeFinetuner(model, lr=1e-3, capture=True)
    eager = TestTimeFinetuner(model, lr=1e-3, capture=False)
    for counts in (COUNTS, [1, 3, 0, 9]):
        with captured.adapted(texts(), counts) as adapted:
            ours = state(adapted)
        before.check()
        with eager.adapted(texts(), counts) as adapted:
            theirs = state(adapted)
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (counted, "a host tensor that differs from pass to pass"),
        (asked, "forward asks the device for values"),
        (branched, "forward asks the device for values"),
        (buffered, "a parameter or buffer of shape .1,. lies on the host"),
    ],
)
def test_others_run_eagerly_and_say_why(
    change: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    model = built(change)
    tuner = TestTimeFinetuner(model)
    with pytest.warns(UserWarning, match=reason), tuner.adapted(texts(), COUNTS):
        pass
    assert tuner.last_report is not None
    assert tuner.last_report.path == "eager"
    with warnings.catch_warnings(), tuner.adapted(texts(), COUNTS):
        warnings.simplefilter("error")  # one attempt is enough
