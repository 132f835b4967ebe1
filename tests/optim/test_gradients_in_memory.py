# SPDX-License-Identifier: Apache-2.0
"""Tensors over memory that the same launch writes, or that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hullkit import optim
from hullkit.optim import _layouts
from torch import Tensor, nn


@pytest.fixture(params=["dlpack", "plain"], autouse=True)
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch is now, and as one without DLPack's C functions is."""
    if request.param == "plain":
        monkeypatch.setattr(_layouts, "_exchange", None)


def taken() -> tuple[list[nn.Parameter], Tensor]:
    """Two parameters, and a gradient of the first that lies in both."""
    memory = torch.ones(12)
    return [nn.Parameter(memory[:4]), nn.Parameter(memory[4:8])], memory[2:6]


@pytest.mark.parametrize("steps_before", [0, 1, 2])
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_a_gradient_in_a_parameter(kind: str, steps_before: int) -> None:
    params, overlapping = taken()
    optimizer = getattr(optim, kind)(params, lr=0.5)
    for _ in range(steps_before):
        for param in params:
            param.grad = torch.ones(4)
        optimizer.step()
    before = [param.tolist() for param in params]
    params[0].grad, params[1].grad = overlapping, torch.ones(4)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"grad of a parameter of shape \(4,\): .*clone"):
            optimizer.step()
    with pytest.raises(ValueError, match=r"grad of a parameter of shape \(4,\): .*clone"):
        optimizer.step_with({params[0]: torch.ones(4), params[1]: overlapping})
    assert [param.tolist() for param in params] == before
    assert bool(optimizer.state) == (kind == "Adam" and steps_before > 0)
    params[0].grad = overlapping.clone()
    optimizer.step()
    assert [param.tolist() for param in params] != before


@pytest.mark.parametrize("first", [0, 1])
def test_a_gradient_in_a_parameter_of_another_group(first: int) -> None:
    """It is read when its own group's turn comes, as by torch."""
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))]
        optimizer = cls([{"params": [params[first]]}, {"params": [params[1 - first]]}], lr=1.0)
        for _ in range(2):
            params[0].grad, params[1].grad = torch.full((4,), 5.0), params[0].data
            optimizer.step()
        results.append([param.tolist() for param in params])
    assert results[0] == results[1]


def test_gradients_beside_parameters_and_on_them() -> None:
    """Memory that only touches is nobody else's, nor is a place without elements. A parameter that
    is its own gradient is read before it is written."""
    memory = torch.ones(12)
    first, second = nn.Parameter(memory[:4]), nn.Parameter(memory[8:])
    empties = [nn.Parameter(memory[2:2]), nn.Parameter(torch.empty(3, 4)[:0, ::2])]
    first.grad, second.grad = memory[4:8], second.data
    empties[0].grad, empties[1].grad = memory[10:10], torch.empty(0, 2)
    optim.SGD([first, second, *empties], lr=0.5).step()
    assert memory.tolist() == [0.5] * 4 + [1.0] * 4 + [0.5] * 4


def test_a_gradient_in_an_accumulator_that_was_elsewhere() -> None:
    into: list[Any] = [torch.ones(4), torch.ones(4)]
    grads = [torch.ones(4), torch.ones(4)]
    for _ in range(2):
        optim.accumulate_(into, grads)
    for overlapping in ([into[1], grads[1]], [grads[0], into[0]]):
        for _ in range(2):
            with pytest.raises(ValueError, match="grads: expected tensors that share no memory"):
                optim.accumulate_(into, overlapping)
    assert into[0].tolist() == into[1].tolist() == [3.0] * 4
    optim.accumulate_(into, [into[0], grads[1]])
    assert into[0].tolist() == [6.0] * 4


@pytest.mark.plain_memory
@pytest.mark.parametrize("transposed", [False, True])  # a copy would be read, too
@pytest.mark.parametrize(
    ("which", "steps_before"),
    [("params", 0), ("params", 2), ("state", 0), ("state", 2), ("grad", 0)],
)
def test_memory_that_was_cut(which: str, steps_before: int, transposed: bool) -> None:
    param = nn.Parameter(torch.ones(60, 60))
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9)
    for _ in range(steps_before):
        param.grad = torch.ones(60, 60)
        optimizer.step()
    param.grad = torch.ones(60, 60).t() if transposed else torch.ones(60, 60)
    cut = {"params": param.data, "grad": param.grad}
    if which == "state":
        cut["state"] = optimizer.state[param]["momentum_buffer"] = torch.zeros(60, 60)
    cut[which].untyped_storage().resize_(4000)
    with pytest.raises(ValueError, match=f"{which}.*: expected a storage of at least 14400 bytes"):
        optimizer.step()
