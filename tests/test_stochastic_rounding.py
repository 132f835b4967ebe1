"""bfloat16 parameters whose updates are smaller than half a step."""

from __future__ import annotations

import pytest
import torch
from _optim import WAYS, Way, parameters, set_grads
from hullkit import optim
from torch import nn


@pytest.mark.parametrize("way", WAYS)
def test_small_updates_survive_on_average(way: Way) -> None:
    """Adam moves every parameter by lr a step; a step of bfloat16 at 1 is 2^-8 downwards."""
    lr, steps, size = 2.0**-11, 64, 4096
    moved = {}
    for stochastic in (False, True):
        param = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=way.device))
        optimizer = optim.Adam([param], lr=lr, stochastic_rounding=stochastic, backend=way.backend)
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = 1.0 - param.detach().double().mean().item()
    # 3 standard errors of the mean; one rounding moves by 2^-8 with probability 1/8.
    error = 3 * (steps * 2.0**-16 / 8 / size) ** 0.5
    assert moved[True] == pytest.approx(steps * lr, abs=error)
    if way.backend is None:  # the interpreter cuts instead of rounding to nearest
        assert moved[False] == 0.0


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_every_run_others_every_step(way: Way) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        params = parameters([torch.full((3000,), 1.0, device=way.device).bfloat16()] * 2)
        optimizer = optim.AdamW(params, stochastic_rounding=True, backend=way.backend)
        seen = []
        for call in range(2):
            before = [param.detach().clone() for param in params]
            set_grads([params], 7)
            optimizer.step()
            seen += [(p != b) for p, b in zip(params, before, strict=True)]
            assert call == 0 or not torch.equal(seen[-1], seen[-3])
        assert not torch.equal(seen[0], seen[1])  # two tensors, two noises
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_core_and_triton_round_alike() -> None:
    device, backend = ("cuda", None) if torch.cuda.is_available() else ("cpu", "triton")
    start = torch.randn(5000).bfloat16()
    core, other = parameters([start]), parameters([start.to(device)])
    first = optim.Adam(core, lr=1e-3, stochastic_rounding=True)
    second = optim.Adam(other, lr=1e-3, stochastic_rounding=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    core[0].grad = torch.randn(5000, generator=generator).bfloat16()
    other[0].grad = core[0].grad.to(device)
    first.step(num_steps=2)
    second.step(num_steps=2)
    # Where float32 itself differs in its last bit, the noise may tip the other way.
    assert (core[0] == other[0].cpu()).double().mean() > 0.995


@pytest.mark.parametrize("way", WAYS)
def test_infinities_and_nan_pass_through(way: Way) -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3e38, 0.0])
    param = nn.Parameter(values.bfloat16().to(way.device))
    optimizer = optim.Adam([param], lr=0.0, stochastic_rounding=True, backend=way.backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param[0] == float("inf")
    assert param[1] == float("-inf")
    assert param[2].isnan()
    assert param[4] == 0.0
