"""Choosing training sequences for a prompt: LMO, Frank-Wolfe, nearest neighbours."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._arrays import takes_arrays
from ._checks import (
    Problem,
    check_choice,
    check_device,
    check_int,
    check_number,
    check_pool_query,
)
from .reference import batched


class Status(IntEnum):
    """Why a Frank-Wolfe run ended; `FrankWolfeResult.status` holds these numbers."""

    CONVERGED = 0  # ||query - iterate|| < tol
    MAX_SUPPORT = 1  # max_support distinct vertices touched
    MAX_ITERS = 2  # max_iters steps taken
    STALLED = 3  # the LMO answered the iterate itself: the iterate is an optimal vertex
    BROKEN = (
        4  # on CUDA devices, where the CPU raises: NaN, Inf, lengths or candidates out of range
    )


class LMOResult(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # [B] int64; hides tuple.index
    value: Tensor  # [B] float64


class KNNResult(NamedTuple):
    indices: Tensor  # [B, k] int64, nearest first, -1 = padding
    values: Tensor  # [B, k] float64 inner products, -inf = padding


class FrankWolfeResult(NamedTuple):
    indices: Tensor  # [B, S] int64 by falling weight, -1 = padding
    weights: Tensor  # [B, S] float64, 0 = padding
    support_size: Tensor  # [B] int64
    residual_norm: Tensor  # [B] float64
    dual_gap: Tensor  # [B] float64
    num_iters: Tensor  # [B] int64
    status: Tensor  # [B] int64, see Status


@takes_arrays
def lmo(
    pool: Tensor,
    direction: Tensor,
    *,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> LMOResult:
    """Linear minimisation oracle over the hull of each pool.

    For every b: `index[b] = argmin_i <direction[b], pool[b, i]>` and `value[b]` that minimum.
    `direction` is a gradient: pass minus the residual to find the vertex most aligned with it.
    Equivalent to: `(pool @ direction).min(0)`, with the lowest index on a tie.

    Args:
        pool: `(n, d)` or `(B, n, d)`; float64, float32, float16 or bfloat16. `(n, d)` with a batch
            of directions is shared by all of them. Arrays of NumPy, CuPy, JAX or any library that
            speaks DLPack do as well, all of a call from one library: they are read where they lie,
            on the device they are on, and the results are arrays of that library.
        direction: `(d,)` or `(B, d)`, the pool's dtype and device.
        lengths: `(B,)` integers, 1 <= lengths[b] <= n: candidates from lengths[b] on are ignored.
            For an unbatched call a 0-d tensor.
        candidates: `(B, n)` integers, rows of a shared `pool (M, d)`, -1 = none; `(n,)` unbatched.
            Returned indices are then positions in `candidates[b]`. Nothing is gathered into a copy.
        backend: None for the kernels, "reference" for the float64 oracle.
    Returns:
        LMOResult(index `(B,)` int64, value `(B,)` float64); 0-d tensors for an unbatched call.
    Raises:
        TypeError, ValueError: argument, expectation and what came; also for NaN or Inf, and for
            lengths or candidates out of range. On a CUDA device, where the host does not wait for
            values, such an entry gets index -1 and value NaN instead; others are not touched by it.
        NotImplementedError: tensors on a device without kernels.

    Products accumulate in float32 (float64 for float64 input; on CUDA for float32 input too) in an
    order that depends on d alone: the same query gives the same bits in any batch and with any
    number of threads. CUDA calls go to the current stream, never wait for it, and can be captured.
    Cost: B n d multiply-adds; on CUDA one pass over a shared pool for every 16 directions.
    Workspace there: 16 bytes for every 128 candidates of a query, at most 16 KiB.
    """
    problem = check_pool_query(pool, direction, lengths, candidates, query_name="direction")
    check_device("lmo", problem.pool, backend)
    out = LMOResult(problem.empty(torch.int64), problem.empty(torch.float64))
    run = _ops.lmo if backend is None else batched.lmo
    run(*problem, *out)
    return out


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
    """The k pool rows with the largest inner product with each query.

    Equivalent to: `(pool @ query).topk(k)`, with the lowest index on a tie.

    Args:
        pool, query, lengths, candidates, backend: as in :func:`lmo`, `query` for `direction`.
        k: 1 <= k <= n.
    Returns:
        KNNResult(indices `(B, k)` int64, values `(B, k)` float64), largest first; where a query has
        fewer than k valid candidates, indices end in -1 and values in -inf.
    Raises:
        As :func:`lmo`; ValueError for k outside 1..n.

    Numerics and broken entries as in :func:`lmo`.
    Cost: B n d multiply-adds and a partial sort of n. On CUDA k <= 2048 for n > 4096; workspace: 16
        bytes for each candidate of a query, and k / 4096 of that, in pieces of at most 512 MiB (or
        16 queries).
    """
    problem = check_pool_query(pool, query, lengths, candidates)
    check_device("knn", problem.pool, backend)
    check_int("k", k, 1, problem.positions)
    out = KNNResult(problem.empty(torch.int64, k), problem.empty(torch.float64, k))
    run = _ops.knn if backend is None else batched.knn
    run(*problem, *out)
    return out


@takes_arrays
def frank_wolfe(
    pool: Tensor,
    query: Tensor,
    *,
    max_support: int | None = None,
    max_iters: int = 250,
    tol: float = 1e-5,
    variant: str = "vanilla",
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> FrankWolfeResult:
    """Sparse convex reconstruction of each query from its pool.

    Minimises `f(w) = 1/2 ||query - sum_i w_i pool_i||^2` over the simplex by Frank-Wolfe with exact
    line search, from the vertex with the largest inner product with the query. All ties go to the
    lowest index. Equivalent to: `hullkit.reference.frank_wolfe`, for every query.

    Args:
        pool, query, lengths, candidates, backend: as in :func:`lmo`, `query` for `direction`.
        max_support: stop once this many distinct vertices were touched (their weight may have
            become 0 since); >= 1, None for no limit. 1 returns the nearest vertex.
        max_iters: >= 0 steps at most.
        tol: stop when `||query - iterate|| < tol`, in the units of the input; >= 0.
        variant: "vanilla".
    Returns:
        FrankWolfeResult with S = min(max_support, n, max_iters + 1):
        indices `(B, S)` int64: the touched vertices by falling weight, then -1;
        weights `(B, S)` float64 >= 0 that sum to 1; support_size `(B,)`: vertices touched;
        residual_norm `(B,)` float64: `||query - sum_i w_i pool_i||`;
        dual_gap `(B,)` float64: `max_i <gradient, iterate - pool_i>`, a bound on `f(w) - min f`;
        num_iters `(B,)` int64; status `(B,)` int64, see :class:`Status`.
        Without the leading B for an unbatched call.
    Raises:
        As :func:`lmo`, but a broken entry on a CUDA device gets status BROKEN, indices -1 and NaN
        certificates; ValueError for options out of range.

    Numerics: inner products as in :func:`lmo`, everything after them in float64; residual_norm and
    dual_gap are recomputed from the input at the end. float64 input follows the oracle's path.
    Cost: O(n d) for each vertex touched (a column of the pool's Gram matrix, computed once), O(n)
    for each iteration. Memory: at most 4 n S values for each query in flight (one a thread).
    On CUDA with n <= 4096 the whole Gram matrix is computed, on tensor cores, and certificates come
    from it and the weights (the residual_norm of half types, and where it is below 1e-3 ||query||,
    from the input); workspace: 8 (n + 1)^2 bytes a query, in pieces of at most 512 MiB (or one
    query). With more candidates, up to a whole corpus, nothing grows with B n: every iteration is
    one pass over the pool, for up to 16 queries that share it without lengths or candidates, else
    for one; `num_iters + 2` passes in all (of the query with the most; one more if it stalled), and
    `max_iters + 2` launches of them, which end at once where no query needs them. Workspace: about
    16 (d + S) bytes a query, and at most 16 KiB more. There float32 rows meet the residual in
    float64, so float32 input follows the float64 oracle's path on the same values; halves meet it
    rounded to 22 (float16) or 24 bits (bfloat16) and sum in float32, so a vertex is the best to
    within about 2^-21 ||residual|| max ||pool_i||, and so is the dual gap. Steps and norms are
    float64.
    Source: Jaggi 2013; HullFT, arXiv 2605.30337.
    """
    problem = check_pool_query(pool, query, lengths, candidates)
    check_device("frank_wolfe", problem.pool, backend)
    check_choice("variant", variant, ("vanilla",))
    options, out = frank_wolfe_options(problem, max_support, max_iters, tol)
    run = _ops.frank_wolfe if backend is None else batched.frank_wolfe
    run(*problem, *options, *out)
    return out


def frank_wolfe_options(
    problem: Problem, max_support: int | None, max_iters: int, tol: float
) -> tuple[tuple[int, int, float], FrankWolfeResult]:
    """Checked options as the operators take them, and the outputs to fill."""
    check_int("max_iters", max_iters, 0)
    tol = check_number("tol", tol, 0.0)
    width = min(problem.positions, max_iters + 1)
    if max_support is None:
        max_support = problem.positions + 1  # never reached
    else:
        width = min(width, check_int("max_support", max_support, 1))
    indices = problem.empty(torch.int64, width)
    count = problem.empty(torch.int64)
    length = torch.empty_like(count, dtype=torch.float64)
    out = FrankWolfeResult(  # empty_like: half the cost of empty or less, and there are seven
        indices=indices,
        weights=torch.empty_like(indices, dtype=torch.float64),
        support_size=count,
        residual_norm=length,
        dual_gap=torch.empty_like(length),
        num_iters=torch.empty_like(count),
        status=torch.empty_like(count),
    )
    return (max_support, max_iters, tol), out
