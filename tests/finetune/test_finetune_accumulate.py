# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner(mode="accumulate"): one update with the mean gradient of the multiset."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _models import COUNTS, MODELS, Before, plain, state, texts
from hullkit.finetune import TestTimeFinetuner, eager_passes
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("build", MODELS)
def test_is_one_update_with_the_mean_gradient(build: Callable[[], nn.Module]) -> None:
    """Against torch: the loss of the whole multiset, backpropagated in one go."""
    model = build()
    naive = copy.deepcopy(model).eval()
    losses = []
    for ids, count in zip(texts(), COUNTS, strict=True):
        if count:
            output = naive(ids[None])
            logits = (output if isinstance(output, torch.Tensor) else output.logits)[0, :-1]
            losses.append(F.cross_entropy(logits, ids[1:]) * count / sum(COUNTS))
    torch.stack(losses).sum().backward()
    torch.optim.Adam(naive.parameters(), lr=1e-2).step()
    before = Before(model)
    tuner = TestTimeFinetuner(model, lr=1e-2, mode="accumulate", refresh_interval=1)
    with tuner.adapted(texts(), COUNTS) as adapted:
        for p, wanted in zip(adapted.parameters(), naive.parameters(), strict=True):
            # Adam's first update is lr times the sign, where the gradient is not nearly zero.
            torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-4)
        assert all(p.grad is None for p in adapted.parameters())
    before.check()
    report = tuner.last_report
    assert report is not None
    assert report.num_updates == 1
    assert report.num_passes == len(report.losses) == sum(count > 0 for count in COUNTS)


def test_scaling_all_counts_changes_nothing() -> None:
    results = []
    for scale in (1, 8):
        tuner = TestTimeFinetuner(plain(), lr=1e-2, mode="accumulate")
        with tuner.adapted(texts(2), [scale * 3, scale]) as model:
            results.append(state(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_bfloat16_sums_in_float32() -> None:
    """Hundreds of equal examples: in bfloat16 their sum would stop growing at 256 shares."""
    model = plain().bfloat16()
    tuner = TestTimeFinetuner(model, lr=1e-2, mode="accumulate")
    with tuner.adapted([texts(1)[0]] * 3, [1, 1000, 1]) as adapted:
        many = state(adapted)
    with tuner.adapted(texts(1), [1]) as adapted:
        one = state(adapted)
    trained = [name for name, _ in model.named_parameters()]
    for name in trained:
        same = (many[name] == one[name]).double().mean()
        assert same > 0.9, name


def test_bad_mode() -> None:
    with pytest.raises(ValueError, match="mode: expected one of 'reuse', 'accumulate', got 'sum'"):
        TestTimeFinetuner(plain(), mode="sum")


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_failure_while_accumulating(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], failing: int
) -> None:
    original, calls = eager_passes.accumulate_, 0

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error("injected")
        return original(*args)

    monkeypatch.setattr(eager_passes, "accumulate_", fails)
    model = plain()
    before = Before(model)
    tuner = TestTimeFinetuner(model, mode="accumulate")
    with pytest.raises(error, match="injected"):
        tuner.adapted(texts(), COUNTS).__enter__()
    before.check()
    assert tuner.last_report is None
