# SPDX-License-Identifier: Apache-2.0
"""Causal attention by kernels: values, gradients, and when they are taken.

In Triton's interpreter on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _fused import DEVICE, DTYPES, assert_close, gradients, in_float64, random
from hullkit.language_model import short_attention
from hullkit.language_model.fused_functions import FusedFunctions
from torch import Tensor

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * 0.3
    seen = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.where(seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True], ids=["few heads", "many heads"])
@pytest.mark.parametrize(
    ("texts", "length", "heads", "shared", "width"),
    [
        (1, 1, 1, 1, 8),
        (1, 63, 2, 2, 32),
        (1, 130, 6, 2, 24),
        (3, 70, 3, 1, 16),
        (1, 80, 2, 1, 16),
        (2, 90, 4, 2, 64),
        (1, 96, 2, 2, 24),
        (2, 128, 4, 2, 64),
    ],
)
def test_attention(
    texts: int, length: int, heads: int, shared: int, width: int, many: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(short_attention, "_MANY_PROGRAMS", 0 if many else 1 << 30)
    q = random(texts, length, heads, width, dtype=dtype).transpose(1, 2)
    k = random(texts, length, shared, width, dtype=dtype, seed=1).transpose(1, 2)
    v = random(texts, shared, length, width, dtype=dtype, seed=2)
    assert short_attention.takes(q, k, v)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return short_attention.causal_attention(q, k, v, 0.3, dtype)

    # Weights and their gradients are rounded to `dtype` before the second product.
    assert_close(gradients(own, q, k, v), in_float64(exact, q, k, v), 16.0, 1.0)


@pytest.mark.parametrize("many", [False, True], ids=["few heads", "many heads"])
def test_a_gradient_that_lies_by_columns(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_attention, "_MANY_PROGRAMS", 0 if many else 1 << 30)
    q, k, v = (random(1, 2, 40, 16, seed=seed) for seed in range(3))

    def by_columns(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: attention(*given).transpose(2, 3)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return short_attention.causal_attention(q, k, v, 0.3, torch.float32)

    found = gradients(by_columns(own), q, k, v)
    assert_close(found, in_float64(by_columns(exact), q, k, v), 16.0, 1.0)


@pytest.mark.parametrize("trained", ["q", "k", "v"])
def test_attention_of_which_one_input_is_trained(trained: str) -> None:
    """In float16; the query is of another dtype than keys and values, as under autocast."""
    q, k, v = (random(2, 2, 70, 16, seed=i) for i in range(3))
    q, k, v = q, k.half(), v.half()
    own = {"q": q, "k": k, "v": v}[trained].requires_grad_()
    y = short_attention.causal_attention(q, k, v, 0.3, torch.float16)
    assert y.dtype is torch.float16
    y.float().square().sum().backward()
    assert own.grad is not None
    assert own.grad.dtype is own.dtype
    exact = own.detach().double().requires_grad_()
    inputs = [exact if x is own else x.detach().double() for x in (q, k, v)]
    F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3).square().sum().backward()
    assert_close([own.grad.half()], [exact.grad], 16.0, 1.0)


@pytest.mark.parametrize(
    ("texts", "heads", "shared", "length", "width", "taken"),
    [
        (1, 12, 12, 416, 64, True),  # few heads
        (1, 32, 8, 416, 64, False),  # too many for few, too few for many
        (8, 9, 3, 416, 64, True),  # many heads
        (64, 9, 3, 512, 64, True),
        (64, 9, 3, 544, 64, False),  # long texts
        (64, 9, 3, 416, 128, False),  # wide heads
        (8192, 9, 3, 32, 64, False),  # more than a grid has
    ],
)
def test_which_attention_is_taken(
    texts: int, heads: int, shared: int, length: int, width: int, taken: bool
) -> None:
    q, k = (
        torch.empty(texts, n, length, width, device="meta", dtype=torch.bfloat16)
        for n in (heads, shared)
    )
    assert short_attention.takes(q, k, k) is taken


@pytest.mark.parametrize("scale", [None, 0.25, 0.0, -0.3])
def test_scales_of_attention(scale: float | None) -> None:
    """The kernels are for scales above 0; others are torch's."""
    x = random(1, 2, 20, 16, dtype=torch.bfloat16).requires_grad_()
    with FusedFunctions(backend="triton") as mode:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=scale)
    assert bool(mode.names) == (scale is None or scale > 0.0)
    if not mode.names:
        return
    wide = x.detach().float()
    wanted = F.scaled_dot_product_attention(wide, wide, wide, is_causal=True, scale=scale)
    # The weights and the result are rounded, and sums of rounded weights: two units at most.
    torch.testing.assert_close(y.float(), wanted, rtol=0.0, atol=2.0 * 2.0**-7)


def test_attention_that_is_not_causal_stays_torchs() -> None:
    q: Any = random(1, 2, 9, 16, dtype=torch.bfloat16).requires_grad_()
    mode = FusedFunctions(backend="triton")
    with mode:
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, q, q, torch.zeros(9, 9, dtype=q.dtype, device=DEVICE))
    assert not mode.names
