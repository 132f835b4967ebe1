# SPDX-License-Identifier: Apache-2.0
"""Gradients other than those in `.grad`: scaled to a norm, or handed to the step."""

from __future__ import annotations

import pytest
import torch
from _optim import WAYS, Way, check_equal, equal_bits, odd_tensors, parameters, set_grads
from hullkit import optim
from torch import nn


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch(max_norm: float, way: Way) -> None:
    """Over two groups; gradients stay as they are."""
    tensors = odd_tensors(torch.float32, way.device)
    params, others = parameters(tensors), parameters(tensors)
    groups = [{"params": params[:5]}, {"params": params[5:], "lr": 0.1}]
    ours = optim.Adam(groups, max_grad_norm=max_norm, backend=way.backend)
    theirs = torch.optim.Adam([{"params": others[:5]}, {"params": others[5:], "lr": 0.1}])
    for call in range(3):
        set_grads([params, others], call)
        grads = [param.grad.clone() for param in params]
        ours.step(num_steps=2)
        norm = nn.utils.clip_grad_norm_(others, max_norm)
        theirs.step()
        theirs.step()
        assert ours.grad_norm is not None
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert equal_bits([p.grad for p in params], grads)
    check_equal(ours, params, theirs, others, 4e-6)


@pytest.mark.parametrize("size", [1e-6, 0.0])
def test_clipping_of_tiny_gradients_equals_torch(size: float) -> None:
    """torch adds a millionth to the norm."""
    [ours], [theirs] = parameters([torch.zeros(1)]), parameters([torch.zeros(1)])
    ours.grad, theirs.grad = torch.full((1,), size), torch.full((1,), size)
    optim.SGD([ours], lr=1.0, max_grad_norm=size).step()
    nn.utils.clip_grad_norm_([theirs], size)
    torch.optim.SGD([theirs], lr=1.0).step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("way", WAYS)
def test_step_with_wider_gradients(way: Way) -> None:
    """float32 sums update bfloat16 parameters; others and .grad are left alone."""
    params = parameters([torch.ones(40, device=way.device).bfloat16() for _ in range(2)])
    optimizer = optim.Adam(params, lr=0.25, backend=way.backend)
    optimizer.step_with({params[0]: torch.ones(40, device=way.device)})
    assert params[0].grad is None
    assert torch.equal(params[0], torch.full_like(params[0], 0.75))
    assert torch.equal(params[1], torch.ones_like(params[1]))
    assert len(optimizer.state) == 1
    for dtype, wanted in ((torch.bfloat16, 0.5), (torch.float32, 0.25)):  # of other dtypes later
        optimizer.step_with({params[0]: torch.ones(40, dtype=dtype, device=way.device)})
        torch.testing.assert_close(params[0], torch.full_like(params[0], wanted))
