# SPDX-License-Identifier: Apache-2.0
"""Adam's updates with gradients that are products: how tiles are spread, and the kernel's bits."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from _products import BETAS, Matrices
from hullkit.native import kernels
from hullkit.optim._products import aligned, spread, takes_products
from hypothesis import given

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 140))
def test_every_tile_has_one_program(tiles: list[int], processors: int) -> None:
    chunks = spread(tiles, processors)
    taken = [
        (matrix, first + i * step) for matrix, first, count, step in chunks for i in range(count)
    ]
    assert sorted(taken) == [(m, i) for m, count in enumerate(tiles) for i in range(count)]
    assert len(chunks) <= max(processors, len(tiles))
    assert min(count for _, _, count, _ in chunks) >= 1


@pytest.mark.parametrize(
    ("shape", "dtype", "copied"),
    [
        ((132, 128), torch.bfloat16, False),
        ((128,), torch.bfloat16, False),
        ((0, 128), torch.bfloat16, False),
        ((16, 4096), torch.bfloat16, False),
        ((128, 128), torch.float64, True),
        ((128, 128), torch.float32, False),
        ((128, 128), torch.bfloat16, True),
    ],
)
def test_parameters_that_the_kernel_leaves_to_others(
    shape: tuple[int, ...], dtype: torch.dtype, copied: bool
) -> None:
    param = torch.zeros(shape, dtype=dtype)
    copy = param.bfloat16() if copied else None
    assert not takes_products(param, (param.clone(), param.clone()), copy)


@pytest.mark.parametrize("first", [0, 4, 8])
@pytest.mark.parametrize("gap", [0, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_as_the_kernel_reads_them(first: int, gap: int, transposed: bool) -> None:
    wide = torch.randn(16, first + 16 + gap).bfloat16()[:, first : first + 16]
    factor = wide.t() if transposed else wide
    found = aligned(factor)
    assert torch.equal(found, factor)
    assert found.stride(1) == 1
    assert (found.data_ptr() | 2 * found.stride(0)) % 16 == 0
    copied = transposed or first % 8 or (first + gap) % 8
    assert (found is not factor) == bool(copied)


needs_kernel = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.adam_product_usable(torch.device("cuda", 0))),
    reason="needs a build with CUDA, and a GPU with the shared memory of its blocks",
)
SHAPES = {
    "small": [(8, 16), (128, 128), (136, 1000)],
    "many tiles": [(2048, 3072), (640, 264)],
}


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("limit", [0, 1, 2, 5])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_product_and_adam(
    dtype: torch.dtype, stochastic: bool, shapes: str, limit: int
) -> None:
    """Factors are small integers, so no order of additions rounds."""
    one, other = (Matrices(dtype, SHAPES[shapes], tokens=77) for _ in range(2))
    before = one.state()
    stochastic = stochastic and dtype is not torch.float32
    assert not one.update(limit, True, stochastic)
    assert not other.update(limit, False, stochastic)
    assert all(map(torch.equal, one.state(), other.state()))
    if limit:
        assert not any(map(torch.equal, one.state(), before))


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 32, 400])
def test_extreme_moments_and_lengths(dtype: torch.dtype, eps: float, tokens: int) -> None:
    one, other = (Matrices(dtype, [(128, 264)], tokens) for _ in range(2))
    for matrices in (one, other):
        matrices.squares[0][::2] = 0.0
        matrices.moments[0][::3] = 1e-20
        matrices.a[0][:, ::5] = 0.0
    assert one.update(3, True, eps=eps) == other.update(3, False, eps=eps)
    for mine, theirs in zip(one.state(), other.state(), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (76, 135)])
def test_a_gradient_that_is_not_finite_is_told(value: float, place: tuple[int, int]) -> None:
    matrices = Matrices(torch.float32, [(128, 128), (136, 1000)], tokens=77)
    matrices.a[1][place] = value
    assert matrices.update(1, fused=True)


@pytest.mark.gpu
@needs_kernel
def test_the_product_is_a_sum_in_float32() -> None:
    """exp_avg after an update from 0 is (1 - beta1) times the gradient, which has two roundings."""
    matrices = Matrices(torch.float32, [(256, 384)], tokens=400)
    generator = torch.Generator("cuda").manual_seed(1)
    for factor in (*matrices.a, *matrices.b):
        factor.normal_(generator=generator)
    matrices.moments[0].zero_()
    matrices.update(1, fused=True)
    a, b = matrices.a[0].double(), matrices.b[0].double()
    exact, sizes = a.mT @ b, a.abs().mT @ b.abs()
    found = matrices.moments[0].double() / (1.0 - BETAS[0])
    bound = 2.0**-8 * exact.abs() + 400 * 2.0**-23 * sizes
    assert bool(((found - exact).abs() <= bound).all())
