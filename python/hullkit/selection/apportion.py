# SPDX-License-Identifier: Apache-2.0
"""Largest-remainder apportionment."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import check_device, check_floating, check_total
from ..native import operators
from ..reference import batched

operators.check_arguments("apportion", "weights", "total", "counts")


@takes_arrays
def apportion(weights: Tensor, total: int, *, backend: str | None = None) -> Tensor:
    """Largest-remainder (Hamilton) apportionment of `total` units.

    `counts_i = floor(total * w_i / sum w)`, plus one for the largest remainders until the counts
    sum to `total`. A tie goes to the lowest index.

    Args:
        weights: `(S,)` or `(B, S)` floating. Negative weights count as 0; if all are 0 they count
            as uniform.
        total: 1 <= total <= 2**40.
        backend: None for the kernels, "reference" for the oracle.
    Returns:
        counts int64 of the same shape.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN, Inf,
            weights whose sum overflows, and quotas that float64 cannot sum to total. A CUDA call
            does not wait for values: there such an entry gets counts of -1 instead.
        NotImplementedError: the device has no kernels.

    >>> import hullkit, torch
    >>> hullkit.apportion(torch.tensor([0.5, 0.3, 0.2]), 4)
    tensor([2, 1, 1])

    Quotas and remainders are float64. Cost: O(S log S).
    """
    weights = check_floating("weights", weights)
    check_device("apportion", weights, backend)
    total = check_total(total)
    if weights.ndim not in (1, 2) or weights.shape[-1] == 0:
        raise ValueError(
            f"weights: expected shape (S,) or (B, S) with S >= 1, got {tuple(weights.shape)}"
        )
    weights = as_float64(weights)
    counts = torch.empty(weights.shape, dtype=torch.int64, device=weights.device)
    run = operators.apportion if backend is None else batched.apportion
    run(weights, total, counts)
    return counts


def as_float64(weights: Tensor) -> Tensor:
    return weights.detach().to(torch.float64).contiguous()
