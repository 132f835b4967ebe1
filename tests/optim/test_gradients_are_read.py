# SPDX-License-Identifier: Apache-2.0
"""A step only reads gradients: they may lie in memory that nobody may write to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hullkit import optim
from torch import nn

MAKE: list[Any] = [
    lambda params: optim.SGD(params, lr=0.1),
    lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    lambda params: optim.Adam(params, lr=0.1),
    lambda params: optim.SGD(params, lr=0.1, max_grad_norm=1.0),
]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("size", [13, 5003])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.filterwarnings("ignore:hullkit. moments of float16")
def test_gradients_in_a_file(tmp_path: Path, make: Any, size: int, dtype: Any) -> None:
    np.ones(size, dtype).tofile(tmp_path / "gradients")
    file = np.memmap(tmp_path / "gradients", dtype=dtype, mode="r", shape=(size,))
    gradient = torch.from_numpy(file)
    steps = []
    for grad in (gradient, gradient.clone()):
        param = nn.Parameter(torch.ones(size, dtype=gradient.dtype))
        param.grad = grad
        make([param]).step(num_steps=2)
        steps.append(param.detach())
    assert torch.equal(*steps)
    assert bool((steps.pop() < 1.0).all())


def test_a_gradient_that_is_the_parameter() -> None:
    param = nn.Parameter(torch.arange(1.0, 14.0))
    param.grad = param.data
    optim.SGD([param], lr=0.1).step()
    assert torch.equal(param.data, torch.arange(1.0, 14.0) - 0.1 * torch.arange(1.0, 14.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("amsgrad", True), ("foreach", True), ("fused", False), ("differentiable", True)],
)
def test_groups_with_options_that_are_refused(name: str, value: bool) -> None:
    group = {"params": [nn.Parameter(torch.zeros(2))], name: value}
    optimizer = optim.Adam([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=f"params: expected groups with {name}={not value}"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=f"params: expected groups with {name}={not value}"):
        optim.Adam([group])


def test_updates_in_backward_have_the_same_bound() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([param])
    with (
        pytest.raises(ValueError, match=r"num_steps: expected an int in 1\.\.16777216"),
        optimizer.update_in_backward(num_steps=2**24 + 1),
    ):
        pass
