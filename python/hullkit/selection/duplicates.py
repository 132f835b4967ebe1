"""Rows that nearly coincide."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_number
from ..native import operators
from ..reference import batched
from ._arrays import takes_arrays
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
    """Groups of candidates that are nearly the same vertex: the representative of each.

    In index order, each candidate joins the first representative r with
    `<pool_r, pool_i> > (1 - eps) ||pool_r|| ||pool_i||` or becomes a representative itself. So each
    member is that close to its representative (perhaps at twice the angle from another member), and
    no chain of neighbours joins what is far apart. Lengths are not compared.
    Equivalent to: `hullkit.reference.duplicates`, for every entry.

    Args:
        pool: `(n, d)` or `(B, n, d)`; float64, float32, float16 or bfloat16.
        eps: 0 < eps <= 2, in units of cosine; the smallest finds equal rows only.
        lengths: `(B,)` integers (0-d for an unbatched call), candidates: `(B, n)` or `(n,)`,
            backend: as in :func:`lmo`. A pool `(n, d)` is shared by a batch of either.
    Returns:
        representatives `(B, n)` int64, positions as in :func:`lmo`: `representatives[b, i] == i`
        for a representative, less than i for its later copies, -1 for what is no candidate; `(n,)`
        for an unbatched call.
    Raises:
        As :func:`lmo`, but a broken entry on a CUDA device gets -1 everywhere; ValueError for eps
        out of range; NotImplementedError on CUDA for n > 4096.

    Numerics: products as in :func:`lmo` (for float32 and half types on the CPU, and for half types
    on CUDA, they resolve cosines to about 1e-6), the comparison in float64. Equal rows have equal
    products, so they are found with every eps; rows of length 0 have no duplicates.
    Cost: O(n r d) for r representatives; on CUDA the Gram matrix, workspace as in frank_wolfe.
    """
    pool = check_floating("pool", pool)
    any_row = pool if pool.ndim < 2 or pool.shape[-2] == 0 else pool[..., 0, :]
    for per_entry, rank in ((candidates, 2), (lengths, 1)):  # these make a batch of a shared pool
        if isinstance(per_entry, Tensor) and per_entry.ndim == rank and any_row.ndim == 1:
            any_row = any_row.expand(per_entry.shape[0], -1)
    problem = check_pool_query(pool, any_row, lengths, candidates)
    check_device("duplicates", problem.pool, backend)
    if not 0.0 < check_number("eps", eps, 0.0) <= 2.0:
        raise ValueError(f"eps: expected a number in (0, 2], got {eps}")
    out = problem.empty(torch.int64, problem.positions)
    run: Callable[..., None] = operators.duplicates if backend is None else batched.duplicates
    run(problem.pool, problem.lengths, problem.candidates, float(eps), out)
    return out
