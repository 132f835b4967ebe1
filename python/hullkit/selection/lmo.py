"""Linear minimisation over the rows of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_device
from ..native import operators
from ..reference import batched
from ._arrays import takes_arrays
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
    """Linear minimisation oracle over the hull of each pool.

    For every b: `index[b] = argmin_i <direction[b], pool[b, i]>` and `value[b]` that minimum.
    `direction` is a gradient: pass minus the residual to find the vertex most aligned with it.
    Equivalent to: `(pool @ direction).min(0)`, with the lowest index on a tie.

    Args:
        pool: `(n, d)` or `(B, n, d)`; float64, float32, float16 or bfloat16. `(n, d)` with a batch
            of directions is shared by all of them. Arrays of NumPy, CuPy, JAX or any library that
            speaks DLPack do as well, all of a call from one library: they are read where they lie,
            on the device they are on, and the results are arrays of that library. Masked arrays of
            NumPy are refused.
        direction: `(d,)` or `(B, d)`, the pool's dtype and device.
        lengths: `(B,)` integers, 1 <= lengths[b] <= n: candidates from lengths[b] on are ignored.
            For an unbatched call a 0-d tensor.
        candidates: `(B, n)` integers, rows of a shared `pool (M, d)`, -1 = none (2**64 - 1 in
            uint64); `(n,)` unbatched.
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
    run = operators.lmo if backend is None else batched.lmo
    run(*problem, *out)
    return out
