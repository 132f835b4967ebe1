# SPDX-License-Identifier: Apache-2.0
"""Which gradients of a warm-up are the product of one linear layer, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hullkit.finetune.capture_memory import NotedGradients, hooks
from hullkit.language_model.fused_functions import FusedFunctions
from hullkit.language_model.products import WeightProducts
from torch import Tensor, nn

NAMES = ("once", "first", "twice", "added", "scaled", "hooked", "told", "wide")


class Layers(nn.Module):
    """Weights that are used in many ways."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            dtype = torch.float32 if name == "wide" else torch.bfloat16
            setattr(self, name, nn.Linear(8, 8, bias=False, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.once(self.first(x)))
        x = self.hooked(self.told(self.twice(x)))
        x = F.linear(x, self.scaled.weight * 2.0)
        penalty = self.added.weight.float().square().sum()
        return self.wide(self.added(x).float()).square().sum() + penalty


def products(model: nn.Module) -> set[str]:
    noted = NotedGradients()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with hooks(list(model.parameters()), noted.note):
        for _ in range(2):  # as after a pass that was too large
            noted.clear()
            with FusedFunctions(backend="triton", products=noted):
                loss = model(x)
            loss.backward()
    assert len(noted.order) == len(NAMES)
    assert all(p.grad is None for p in model.parameters())
    found = {id(p) for p, gradient in noted.order.items() if gradient.is_product}
    return {name for name in NAMES if id(getattr(model, name).weight) in found}


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(0)
    return Layers()


def test_only_whole_gradients_are_products(model: Any) -> None:
    model.hooked.weight.register_hook(lambda gradient: gradient.mul_(2.0))
    model.told.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    assert products(model) == {"once", "first"}


def test_without_hooks_theirs_are_products_too(model: Layers) -> None:
    assert products(model) == {"once", "first", "hooked", "told"}


def test_passes_that_nobody_is_told_of(model: Layers) -> None:
    x = torch.randn(5, 8).bfloat16()
    with FusedFunctions(backend="triton"):
        model(x).backward()
    assert all(p.grad is not None for p in model.parameters())


class Taking(WeightProducts):
    """Takes the products of one weight."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.products: list[Tensor] = []

    def take(self, weight: Tensor, a: Tensor, b: Tensor) -> bool:
        if weight is self.weight:
            self.products.append(a.mT @ b)
        return weight is self.weight


def test_a_product_that_is_taken_is_no_gradient(model: Any) -> None:
    x = torch.randn(5, 8).bfloat16()
    with FusedFunctions(backend="triton"):
        model(x).backward()
    gradients = {name: getattr(model, name).weight.grad for name in NAMES}
    model.zero_grad()
    taking = Taking(model.once.weight)
    told: list[Any] = []
    with hooks(list(model.parameters()), told.append):
        with FusedFunctions(backend="triton", products=taking):
            loss = model(x)
        loss.backward()
    [product] = taking.products
    assert torch.equal(product, gradients.pop("once"))
    assert model.once.weight.grad is None
    for name, gradient in gradients.items():
        assert torch.equal(getattr(model, name).weight.grad, gradient)
    assert len(told) in (len(NAMES) - 1, len(NAMES))  # torch may tell of an absent gradient, too


class Told(WeightProducts):
    """Keeps the weights that it is told of."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def made(self, weight: Tensor, a: Tensor, b: Tensor, gradient: Tensor) -> None:
        self.weights.append(weight)


def test_only_parameters_are_told_of(model: Layers) -> None:
    told = Told()
    with FusedFunctions(backend="triton", products=told):
        loss = model(torch.randn(5, 8).bfloat16())
    loss.backward()
    own = {id(parameter) for parameter in model.parameters()}
    assert len(told.weights) == len(NAMES)  # all but the scaled one, one of them twice
    assert {id(weight) for weight in told.weights} <= own
