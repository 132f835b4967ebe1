# SPDX-License-Identifier: Apache-2.0
"""Nearest rows by inner product."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import check_device, check_int
from ..native import operators
from ..reference import batched
from ._problem import Problem, check_pool_query
from .results import KNNResult

operators.check_arguments("knn", Problem, KNNResult)


@takes_arrays
def knn(
    pool: Tensor,
    query: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> KNNResult:
    """The k rows of each pool with the largest inner product with the query.

    For embeddings of length 1 these are the nearest neighbours. A tie goes to the lowest index.
    Equivalent to: `(pool @ query).topk(k)`.

    Args:
        pool: candidate embeddings, one a row: `(n, d)`, shared by a batch, or `(B, n, d)`. float64,
            float32, float16 or bfloat16; strided views are fine. NumPy, CuPy and JAX arrays are
            read where they lie, and results are of their library.
        query: the prompt's embedding `(d,)`, or `(B, d)`; the pool's dtype and device.
        k: rows to return, 1 <= k <= n.
        lengths: `(B,)` integers, 0-d unbatched: only the first lengths[b] candidates count.
        candidates: `(B, n)` or `(n,)` integers: rows of a shared pool `(M, d)`, -1 = none. Results
            then name positions in `candidates[b]`. Nothing is gathered into a copy, unless
            the pool lies by columns.
        backend: None for the kernels, "reference" for the float64 oracle in NumPy.
    Returns:
        KNNResult(indices `(B, k)` int64, values `(B, k)` float64), largest value first. A query
        with fewer than k valid candidates ends in -1 and -inf. Without the leading B for an
        unbatched call.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN and Inf,
            and for lengths or candidates out of range. A CUDA call does not wait for values: there
            such an entry gets indices -1 and values NaN instead, and the others are right.
        NotImplementedError: the device has no kernels, or k > 2048 with n > 4096 on CUDA.

    >>> import hullkit, torch
    >>> pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    >>> hullkit.knn(pool, torch.tensor([1.0, 0.0]), 2).indices
    tensor([0, 2])

    Numerics: as in :func:`hullkit.lmo`. Cost: its products, and a sort of k for each query; on CUDA
    16 bytes of workspace for each candidate of a query, in chunks of at most 512 MiB or 16 queries.
    """
    problem = check_pool_query(pool, query, lengths, candidates)
    check_device("knn", problem.pool, backend)
    k = check_int("k", k, 1, problem.positions())
    out = KNNResult(problem.empty(torch.int64, k), problem.empty(torch.float64, k))
    run = operators.knn if backend is None else batched.knn
    run(*problem, *out)
    return out
