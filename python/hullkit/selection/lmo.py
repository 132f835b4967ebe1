# SPDX-License-Identifier: Apache-2.0
"""The linear minimisation oracle over the rows of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import check_device
from ..native import operators
from ..reference import batched
from ._problem import check_pool_query
from .results import LMOResult

operators.check_arguments("lmo", "pool", "direction", "lengths", "candidates", LMOResult)


@takes_arrays
def lmo(
    pool: Tensor,
    direction: Tensor,
    *,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> LMOResult:
    """The row of each pool with the smallest inner product with a direction (LMO).

    `index[b] = argmin_i <direction[b], pool[b, i]>`, and `value[b]` is that minimum. A tie goes to
    the lowest index. Frank-Wolfe passes its gradient, minus the residual, as the direction: the
    answer is then the row that is most aligned with the residual.
    Equivalent to: `(pool @ direction).min(0)`.

    Args:
        pool: candidate embeddings, one a row: `(n, d)`, shared by a batch, or `(B, n, d)`. float64,
            float32, float16 or bfloat16; strided views are fine. NumPy, CuPy and JAX arrays are
            read where they lie, and results are of their library.
        direction: `(d,)` or `(B, d)`; the pool's dtype and device.
        lengths: `(B,)` integers, 0-d unbatched: only the first lengths[b] candidates count.
        candidates: `(B, n)` or `(n,)` integers: rows of a shared pool `(M, d)`, -1 = none. Results
            then name positions in `candidates[b]`. Nothing is gathered into a copy, unless
            the pool lies by columns.
        backend: None for the kernels, "reference" for the float64 oracle in NumPy.
    Returns:
        LMOResult(index `(B,)` int64, value `(B,)` float64); 0-d for an unbatched call.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN and Inf,
            and for lengths or candidates out of range. A CUDA call does not wait for values: there
            such an entry gets index -1 and value NaN instead, and the others are right.
        NotImplementedError: the device has no kernels.

    >>> import hullkit, torch
    >>> pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> hullkit.lmo(pool, torch.tensor([1.0, 0.0])).index
    tensor(2)

    Numerics: sums in float32 (float64 for float64 input, and for float32 input on CUDA). Their
    order depends on d alone: the same bits in any batch and with any number of threads.
    Cost: B n d multiply-adds. A shared pool is read once for a few hundred directions that fit the
    caches, on CUDA once for every 16.
    """
    problem = check_pool_query(pool, direction, lengths, candidates, query_name="direction")
    check_device("lmo", problem.pool, backend)
    out = LMOResult(problem.empty(torch.int64), problem.empty(torch.float64))
    run = operators.lmo if backend is None else batched.lmo
    run(*problem, *out)
    return out
