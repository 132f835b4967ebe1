# SPDX-License-Identifier: Apache-2.0
"""Adam's quotient where its parts leave the range of float32 or of reciprocals, on every way."""

from __future__ import annotations

import os
import subprocess
import sys

import hullkit
import pytest
import torch
from _optim import WAYS, Way
from hullkit import optim
from torch import nn

BEST = hullkit.build_info()["simd"]
SETS = ["portable", "neon"] if BEST == "neon" else ["portable", "avx2", "avx512"]
HERE = SETS[: SETS.index(BEST) + 1]

# Gradients from nothing to where their squares overflow, side by side in every vector; eps from
# denormal to huge. Elements without a gradient stay, neighbours of any size or not.
PROGRAM = """
import torch, hullkit
assert hullkit.build_info()["simd"] == {simd!r}
sizes = torch.cat([torch.zeros(40), torch.logspace(-30, 18, 200)])
sizes = sizes[torch.randperm(240, generator=torch.Generator().manual_seed(0))]
for eps in (1e-37, 1.1754943508222875e-38, 1e-30, 1e-8, 1e10, 1e30):
    params = [torch.nn.Parameter(torch.zeros(240)) for _ in range(2)]
    ours = hullkit.optim.Adam(params[:1], lr=1.0, eps=eps)
    theirs = torch.optim.Adam(params[1:], lr=1.0, eps=eps, foreach=False)
    for step in range(3):
        for param in params:
            param.grad = sizes * (-1) ** step
        ours.step()
        theirs.step()
        assert not params[0][sizes == 0].any(), eps
        torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-7)
"""


@pytest.mark.parametrize("simd", HERE)
def test_any_denominator(simd: str) -> None:
    subprocess.run(
        [sys.executable, "-c", PROGRAM.format(simd=simd)],
        check=True, env={**os.environ, "HULLKIT_SIMD": simd},
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:hullkit. moments of float16", "ignore:overflow encountered")
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # Triton 3.8's interpreter: 0 * inf
def test_halves_of_gradients_whose_squares_overflow(
    dtype: torch.dtype, stochastic: bool, num_steps: int, way: Way
) -> None:
    """Every update moves by lr; by nothing, as torch's, where a way's square may be infinite."""
    sizes = torch.tensor([10.0**exponent for exponent in range(15, 39)], device=way.device)
    grads = torch.cat([sizes, -sizes, sizes[:1] * float("inf")])
    param = nn.Parameter(torch.ones(len(grads), dtype=dtype, device=way.device))
    optimizer = optim.Adam([param], lr=1 / 64, stochastic_rounding=stochastic, backend=way.backend)
    optimizer.step_with({param: grads}, num_steps=num_steps)
    moved = (1 - param.detach().float()) * grads.sign()
    assert not moved[-1].isfinite()
    held = (moved == 0.0) & (grads.abs() > 5e20)
    # A number below 1 is rounded by less than 2^-8, and one above 1 by less than 2^-7.
    assert ((moved - num_steps / 64).abs() <= 2.0**-7)[:-1][~held[:-1]].all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:hullkit. moments of float16", "ignore:overflow encountered")
def test_a_moment_that_float16_does_not_hold(num_steps: int, way: Way) -> None:
    """An infinite second moment holds its parameter, as with torch."""
    param = nn.Parameter(torch.ones(600, dtype=torch.float16, device=way.device))
    optimizer = optim.Adam([param], lr=1 / 64, backend=way.backend)
    for size in (6e4, 1.0, 1.0):
        param.grad = torch.full_like(param, size)
        optimizer.step(num_steps=num_steps)
        assert optimizer.state[param]["exp_avg_sq"].isinf().all()
    wanted = torch.full((600,), 1 - num_steps / 64)
    torch.testing.assert_close(param.detach().float().cpu(), wanted, rtol=0, atol=2.0**-10)
