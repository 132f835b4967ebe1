# SPDX-License-Identifier: Apache-2.0
"""Forwards that differentiate a part of their own graph, or map over it, with fused functions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _fused import DEVICE, random
from hullkit.language_model.fused_modules import stand_ins
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


class Layers(nn.Module):
    def __init__(self, inner: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)


def of_a_weight(m: Layers, x: Tensor) -> Tensor:
    """The backward pass ends at the weight; what it left for the input is not to be added later."""
    h = m.one(x)
    a, b = m.two(h), m.three(h)
    (g,) = torch.autograd.grad(a.square().mean(), [m.two.weight], retain_graph=True)
    return m.three(a) * g.mean() + a + b


def of_a_norm(m: Layers, x: Tensor) -> Tensor:
    h = m.one(x)
    y = h + m.two(m.norm(h))
    (g,) = torch.autograd.grad(y.square().mean(), [m.norm.weight], retain_graph=True)
    return y + m.three(m.norm(y)) * g.mean()


def of_attention(m: Layers, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(1, -1, 2, 8).transpose(1, 2) for layer in (m.one, m.two, m.three))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    (g,) = torch.autograd.grad(y.square().mean(), [m.three.weight], retain_graph=True)
    return y.transpose(1, 2).flatten(2) * (1.0 + g.mean())


def mapped(m: Layers, x: Tensor) -> Tensor:
    many = torch.stack([x, 2.0 * x])
    return torch.vmap(lambda one: m.three(m.norm(torch.tanh(m.one(one)))))(many).sum(0)


def of_a_function(m: Layers, x: Tensor) -> Tensor:
    g = torch.func.grad(lambda w: m.three(F.linear(x, w)).square().sum())(m.one.weight)
    return F.linear(x, m.one.weight - 0.1 * g)


def along_a_tangent(m: Layers, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda h: m.three(m.one(h)), (x,), (torch.ones_like(x),))[1]


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")  # torch's own use of it
@pytest.mark.parametrize(
    "inner", [of_a_weight, of_a_norm, of_attention, mapped, of_a_function, along_a_tangent]
)
def test_an_inner_gradient(inner: Callable[[Any, Tensor], Tensor]) -> None:
    results = []
    for fused in (False, True):
        model = Layers(inner).to(DEVICE)
        with stand_ins(model, backend="triton") if fused else nullcontext():
            y = model(random(1, 6, 16))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
