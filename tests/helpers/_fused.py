# SPDX-License-Identifier: Apache-2.0
"""Fused functions against exact ones: results and gradients, in roundings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def gradients(
    function: Callable[..., Tensor], *inputs: Tensor, weight: Tensor | None = None
) -> list[Tensor]:
    """The result, and the gradients of its product with fixed numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    numbers = random(*result.shape, seed=9).to(result.dtype)
    result.backward(numbers)
    found = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in found)
    return [result.detach(), *(g for g in found if g is not None)]


def assert_close(
    found: list[Tensor], exact: list[Tensor], roundings: float, least: float = 0.0
) -> None:
    """exact: float64. Differences in roundings of the dtype, relative to the largest element, or to
    `least` where terms of that size cancel."""
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        unit = torch.finfo(a.dtype).eps * max(least, float(b.abs().max()))
        assert float((a.double() - b).abs().max()) <= roundings * unit, a.dtype


def in_float64(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    return gradients(function, *(x.double() for x in inputs))
