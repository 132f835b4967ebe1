# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of training sequences under a Gaussian process: SIFT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import check_cap, check_device, check_positive, check_total
from ..native import operators
from ..reference import batched
from ._problem import Problem, check_pool_query
from .results import SIFTResult


class SIFTOptions(NamedTuple):
    """Checked options as the operator takes them."""

    total: int
    noise: float
    alpha: float  # 0: never stop before `total`
    max_multiplicity: int


operators.check_arguments("sift", Problem, SIFTOptions, SIFTResult)


@takes_arrays
def sift(
    pool: Tensor,
    query: Tensor,
    total: int,
    *,
    noise: float = 0.01,
    alpha: float | None = None,
    max_multiplicity: int | None = None,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> SIFTResult:
    """The greedy choice of the rows that tell most about each query (SIFT).

    The model is a Gaussian process with kernel `k(x, y) = <x, y>` and observation noise. Let k_S be
    the kernel conditioned on the rows S chosen so far. Each step adds the row that maximises
    `k_S(query, pool_i)^2 / (k_S(pool_i, pool_i) + noise)`: by so much falls the query's variance
    `k_S(query, query)`. A row may be chosen again. A tie goes to the lowest index.
    Equivalent to: `hullkit.reference.sift`.

    Args:
        pool: candidate embeddings, one a row: `(n, d)`, shared by a batch, or `(B, n, d)`. float64,
            float32, float16 or bfloat16; strided views are fine. NumPy, CuPy and JAX arrays are
            read where they lie, and results are of their library.
        query: the prompt's embedding `(d,)`, or `(B, d)`, or `(B, m, d)`: prompts of m vectors
            each, whose gains and variances are sums over the vectors. The pool's dtype and device.
        total: the number of steps, >= 1.
        noise: the variance of an observation, > 0, in the squared units of the input.
        alpha: stop after the first step t with `sqrt(variance) > 1 / (alpha t)`, > 0: little
            variance is left to remove for so many updates. None to take all steps.
        max_multiplicity: how often one row may be chosen, >= 1; None for no limit.
        lengths: `(B,)` integers, 0-d unbatched: only the first lengths[b] candidates count.
        candidates: `(B, n)` or `(n,)` integers: rows of a shared pool `(M, d)`, -1 = none. Results
            then name positions in `candidates[b]`. Nothing is gathered into a copy, unless
            the pool lies by columns.
        backend: None for the kernels, "reference" for the float64 oracle in NumPy.
    Returns:
        SIFTResult: order `(B, total)` int64, the rows in order of choice, then -1 if alpha stopped
        it; variance `(B, total)` float64 after each step; indices and counts `(B, min(total, n))`,
        the distinct rows and how often each was chosen; num_steps `(B,)`. Without B for an
        unbatched call.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN and Inf,
            and for lengths or candidates out of range. A CUDA call does not wait for values: there
            such an entry gets order and indices -1 and variance NaN instead, and the others are
            right.
        NotImplementedError: the device has no kernels, or n + m - 1 > 4096 on CUDA.

    >>> import hullkit, torch
    >>> hullkit.sift(torch.eye(3), torch.tensor([0.8, 0.6, 0.0]), total=3).order
    tensor([0, 1, 0])

    Numerics: everything is float64; a variance is right to within the rounding of `||query||^2`,
    magnified by up to `max ||pool_i||^2 / noise`. CUDA sums products of half-precision rows in
    float32, and the same factor magnifies that rounding. Cost: O(n d) for each distinct row,
    O(n (m + min(t, n))) for step t.
    Source: Huebotter et al., arXiv 2410.08020.
    """
    problem = check_pool_query(pool, query, lengths, candidates, several=True)
    check_device("sift", problem.pool, backend)
    total = check_total(total)
    noise = check_positive("noise", noise)
    alpha = 0.0 if alpha is None else check_positive("alpha", alpha)  # 1 / (0 t): never
    cap = check_cap(max_multiplicity, problem.positions(), total)
    order = problem.empty(torch.int64, total)
    indices = problem.empty(torch.int64, min(total, problem.positions()))
    out = SIFTResult(
        order=order,
        variance=torch.empty_like(order, dtype=torch.float64),
        indices=indices,
        counts=torch.empty_like(indices),
        num_steps=problem.empty(torch.int64),
    )
    run = operators.sift if backend is None else batched.sift
    run(*problem, *SIFTOptions(total, noise, alpha, cap), *out)
    return out
