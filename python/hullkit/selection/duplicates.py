# SPDX-License-Identifier: Apache-2.0
"""Rows that nearly coincide."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import check_device, check_floating, check_number
from ..native import operators
from ..reference import batched
from ._problem import check_pool_query

operators.check_arguments("duplicates", "pool", "lengths", "candidates", "eps", "representatives")


@takes_arrays
def duplicates(
    pool: Tensor,
    *,
    eps: float,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The first near copy of each candidate: groups of rows that nearly coincide.

    In the order of the index, candidate i joins the first representative r with
    `<pool_r, pool_i> > (1 - eps) ||pool_r|| ||pool_i||`. If there is none, i becomes a
    representative. So every member is that close to its representative, and no chain of neighbours
    joins rows that are far apart. Lengths of rows are not compared.
    Equivalent to: `hullkit.reference.duplicates`.

    Args:
        pool: candidate embeddings, one a row: `(n, d)`, shared by a batch, or `(B, n, d)`. float64,
            float32, float16 or bfloat16; strided views are fine. NumPy, CuPy and JAX arrays are
            read where they lie, and results are of their library.
        eps: 0 < eps <= 2, in units of cosine. One below 2^-50 counts as 2^-50.
        lengths: `(B,)` integers, 0-d unbatched: only the first lengths[b] candidates count.
        candidates: `(B, n)` or `(n,)` integers: rows of a shared pool `(M, d)`, -1 = none. Results
            then name positions in `candidates[b]`. Nothing is gathered into a copy, unless
            the pool lies by columns.
        backend: None for the kernels, "reference" for the float64 oracle in NumPy.
    Returns:
        representatives `(B, n)` int64: i for a representative, a smaller index for its copies, -1
        for a position without a candidate; `(n,)` for an unbatched call.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN and Inf,
            and for lengths or candidates out of range. A CUDA call does not wait for values: there
            such an entry gets -1 everywhere instead, and the others are right.
        NotImplementedError: the device has no kernels, or n > 4096 on CUDA.

    >>> import hullkit, torch
    >>> pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1e-4]])
    >>> hullkit.duplicates(pool, eps=1e-3)
    tensor([0, 1, 0])

    Numerics: float32 and half types resolve cosines to about 1e-6; equal rows are found with every
    eps. Rows whose squared norm is 0 have no duplicates: those of length 0, and in float32 those
    below about 1e-22. Cost: O(n r d) for r representatives, and O(n) memory; on CUDA the whole Gram
    matrix.
    """
    pool = check_floating("pool", pool)
    if pool.ndim > 1 and pool.shape[-2] > 0:
        any_row = pool[..., 0, :]
    else:  # a row that fits, so that the error is of the pool
        any_row = pool.new_zeros((*pool.shape[:-2], *pool.shape[-1:]))
    for per_entry, rank in ((candidates, 2), (lengths, 1)):  # these make a batch of a shared pool
        if isinstance(per_entry, Tensor) and per_entry.ndim == rank and any_row.ndim == 1:
            any_row = any_row.expand(per_entry.shape[0], -1)
    problem = check_pool_query(pool, any_row, lengths, candidates)
    check_device("duplicates", problem.pool, backend)
    eps = check_eps("eps", eps)
    out = problem.empty(torch.int64, problem.positions())
    run: Callable[..., None] = operators.duplicates if backend is None else batched.duplicates
    run(problem.pool, problem.lengths, problem.candidates, eps, out)
    return out


def check_eps(name: str, value: float) -> float:
    eps = check_number(name, value, 0.0)
    if not 0.0 < eps <= 2.0:
        raise ValueError(f"{name}: expected a number in (0, 2], got {eps}")
    return eps
