# SPDX-License-Identifier: Apache-2.0
"""Half-precision parameters whose updates are smaller than half a step."""

from __future__ import annotations

import copy
import math
from typing import Any

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


def test_a_seed_that_is_set_between_steps() -> None:
    """With the same gradients in the same memory."""
    params = parameters([torch.ones(3000).bfloat16()] * 2)
    optimizers = [optim.Adam([param], stochastic_rounding=True) for param in params]
    set_grads([params], 7)
    params[1].grad = params[0].grad
    for seed, same in ((0, True), (5, False)):
        optimizers[1].seed = seed
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(*params) == same


@pytest.mark.parametrize(
    ("num_steps", "options"),
    [
        (1, {}),
        (2, {}),
        (5, {"weight_decay": 0.3}),
        (8, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
        (8, {"eps": 1e-20}),  # the product of two roots would underflow
    ],
)
def test_core_and_triton_round_alike(num_steps: int, options: dict[str, Any]) -> None:
    device, backend = ("cuda", None) if torch.cuda.is_available() else ("cpu", "triton")
    starts = [torch.randn(5000).bfloat16(), torch.randn(700).bfloat16()]  # each has its own noise
    core, others = parameters(starts), parameters([start.to(device) for start in starts])
    options = {"lr": 1e-2, "stochastic_rounding": True, **options}
    first = optim.Adam(core, **options)
    second = optim.Adam(others, **options, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for param, other in zip(core, others, strict=True):
        param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        param.grad[:100] *= 1e-25  # nothing beside eps
        other.grad = param.grad.to(device)
    first.step(num_steps=num_steps)
    second.step(num_steps=num_steps)
    # Where float32 itself differs in its last bit, the noise may tip the other way.
    for param, other in zip(core, others, strict=True):
        assert (param == other.cpu()).double().mean() > 0.99
    for name in ("exp_avg", "exp_avg_sq"):
        equal = [
            first.state[param][name] == second.state[other][name].cpu()
            for param, other in zip(core, others, strict=True)
        ]
        assert torch.cat(equal).double().mean() > 0.999, name


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [1.0, -3.3e-2, 5e-5, -4e-6])
def test_float16_keeps_small_updates_on_average(way: Way, value: float) -> None:
    """Normal numbers and subnormal ones, whose steps are 2^-24."""
    step = max(2.0**-24, 2.0 ** (math.floor(math.log2(abs(value))) - 10))
    lr, steps, size = step / 8, 16, 1024
    start = torch.full((size,), value, dtype=torch.float16)
    param = nn.Parameter(start.to(way.device, copy=True))
    optimizer = optim.Adam([param], lr=lr, stochastic_rounding=True, backend=way.backend)
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.step()
    moved = (start.double() - param.detach().cpu().double()).mean().item()
    # One rounding moves by a step, or by half of one below a power of two, with probability 1/8.
    error = 3 * step * (steps / 8 / size) ** 0.5
    assert moved == pytest.approx(steps * lr, abs=error)
    assert optimizer.state[param]["exp_avg_sq"].dtype is torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_float16_at_its_limits(way: Way) -> None:
    values = [math.inf, -math.inf, math.nan, 65504.0, -65504.0, 0.0, -0.0, 2.0**-24]
    param = nn.Parameter(torch.tensor(values, dtype=torch.float16, device=way.device))
    optimizer = optim.Adam([param], lr=0.0, stochastic_rounding=True, backend=way.backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    wanted = torch.tensor(values, dtype=torch.float16)
    torch.testing.assert_close(param.detach().cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
def test_float16_stays_at_the_largest_number_that_it_has(way: Way) -> None:
    """Nothing beyond it is drawn: what to nearest would be 65504 is no infinity."""
    param = nn.Parameter(torch.full((600,), 65504.0, dtype=torch.float16, device=way.device))
    optimizer = optim.Adam([param], lr=6.0, stochastic_rounding=True, backend=way.backend)
    param.grad = torch.full_like(param, -1.0)
    optimizer.step()
    assert (param == 65504.0).all()


@pytest.mark.parametrize("way", WAYS)
def test_moments_are_right_on_average(way: Way) -> None:
    """A second moment that grows by 2^-10 of itself: to nearest, bfloat16 would stand still."""
    param = nn.Parameter(torch.zeros(1024, dtype=torch.bfloat16, device=way.device))
    optimizer = optim.Adam(
        [param], lr=0.0, betas=(0.9, 1 - 2.0**-10), stochastic_rounding=True, backend=way.backend
    )
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[param]
    state["exp_avg_sq"].fill_(0.5)
    steps = 16
    for _ in range(steps):
        optimizer.step()
    expected = 1 - 0.5 * (1 - 2.0**-10) ** steps
    # A rounding moves by 2^-8 at most, with probability 1/8; 8 random bits are off by 2^-9 of it.
    error = 3 * 2.0**-8 * (steps / 8 / 1024) ** 0.5 + steps * 2.0**-17
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(expected, abs=error)


@pytest.mark.parametrize("way", WAYS)
def test_state_dicts_of_float16_parameters_go_both_ways(way: Way) -> None:
    """Squares of small gradients survive, though torch itself hands state over in float16."""

    def parameter() -> nn.Parameter:
        return nn.Parameter(torch.ones(600, dtype=torch.float16, device=way.device))

    first, second, third = parameter(), parameter(), parameter()
    ours = optim.Adam([first], stochastic_rounding=True, backend=way.backend)
    first.grad = torch.full_like(first, 1e-5)
    ours.step()
    other = optim.Adam([second], stochastic_rounding=True, backend=way.backend)
    other.load_state_dict(ours.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(other.state[second][name], ours.state[first][name])
    assert bool((other.state[second]["exp_avg_sq"] > 0).all())
    theirs = torch.optim.Adam([third])
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(  # float16's smallest step
        theirs.state[third]["exp_avg"].float(), ours.state[first]["exp_avg"].float(),
        rtol=0, atol=2.0**-24,
    )  # fmt: skip
    other.load_state_dict(theirs.state_dict())
    second.grad = torch.full_like(second, 1e-5)
    other.step()


def test_other_bits_for_another_seed() -> None:
    ends = []
    for seed in (0, 0, 1, 1 << 40):
        param = nn.Parameter(torch.ones(3000, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        optim.Adam([param], stochastic_rounding=True, seed=seed).step()
        ends.append(param.detach())
    assert torch.equal(ends[0], ends[1])
    assert not any(torch.equal(ends[0], end) for end in ends[2:])


@pytest.mark.parametrize("hook", ["pre", "post"])
def test_a_load_within_another(hook: str) -> None:
    """A hook of the user's loads, too, and another comes after it."""
    param = nn.Parameter(torch.ones(4, dtype=torch.float16))
    param.grad = torch.full_like(param, 1e-5)  # its square is 0 in float16
    optimizer = optim.Adam([param], lr=0.5, stochastic_rounding=True)
    optimizer.step()
    state, seen = copy.deepcopy(optimizer.state_dict()), []

    def load(loaded: Any, *_: Any) -> None:
        seen.append("load")
        if len(seen) == 1:
            loaded.load_state_dict(state)

    register = getattr(optimizer, f"register_load_state_dict_{hook}_hook")
    register(load)
    register(lambda *_: seen.append("later"))
    for _ in range(2):
        seen.clear()
        optimizer.load_state_dict(state)
        assert seen == ["load", "load", "later", "later"]
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[param][name], state["state"][0][name])
            assert optimizer.state[param][name].all()
