# SPDX-License-Identifier: Apache-2.0
"""torch swaps tensors in conversions and loads, if it is told to: only those that nobody else holds
or refers to weakly."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hullkit import optim
from torch import nn


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def steps(optimizer: torch.optim.Optimizer, model: nn.Module, count: int = 3) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(count):  # the second looks at what the first has seen
        model(torch.ones(2, 3, dtype=dtype)).square().sum().backward()
        optimizer.step()


@pytest.mark.usefixtures("swapping")
def test_a_model_is_converted_and_loaded_between_steps() -> None:
    """Gradients, which are still there, are swapped too."""
    models = [nn.Linear(3, 3)]
    models.append(copy.deepcopy(models[0]))
    start = copy.deepcopy(models[0].state_dict())
    for module, model in zip((torch.optim, optim), models, strict=True):
        optimizer = module.SGD(model.parameters(), lr=0.01)
        steps(optimizer, model)
        model.double()
        steps(optimizer, model)
        model.load_state_dict(start)
        steps(optimizer, model)
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("swapping")
def test_a_model_is_converted_after_updates_in_backward_and_sums() -> None:
    model = nn.Linear(3, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    sums = [torch.zeros_like(param) for param in model.parameters()]
    for _ in range(2):
        with optimizer.update_in_backward():
            model(torch.ones(2, 3)).sum().backward()
    model(torch.ones(2, 3)).sum().backward()
    for _ in range(2):
        optim.accumulate_(sums, [param.grad for param in model.parameters()])
    model.double()
    assert model.weight.dtype == torch.float64


def test_told_between_steps() -> None:
    model = nn.Linear(3, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    steps(optimizer, model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        steps(optimizer, model)
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.float64


@pytest.mark.usefixtures("swapping")
def test_gradients_of_negatives_are_still_told_apart() -> None:
    """No weak reference says whether an object at the address of the last one is the last one."""
    param = nn.Parameter(torch.zeros(3))
    optimizer = optim.SGD([param], lr=1.0)
    memory = torch.ones(3)
    for negative in (False, False, True, False):
        param.grad = None
        param.grad = torch._neg_view(memory) if negative else memory.detach()
        optimizer.step()
    assert param.tolist() == [-2.0] * 3
