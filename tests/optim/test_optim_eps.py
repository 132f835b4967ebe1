# SPDX-License-Identifier: Apache-2.0
"""Adam's quotient where denominators leave the range of reciprocals, in every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import hullkit
import pytest

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
