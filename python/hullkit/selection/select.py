# SPDX-License-Identifier: Apache-2.0
"""From a prompt and its candidates to a multiset of training sequences: `select`."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any, Literal

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import (
    MAX_TOTAL,
    as_int64,
    check_cap,
    check_choice,
    check_device,
    check_int,
    check_positive,
    check_total,
    has_values,
)
from ..native import operators
from ..reference import batched, ladder
from ._problem import Problem, check_pool_query
from .duplicates import check_eps, duplicates
from .frank_wolfe import FrankWolfeOptions, frank_wolfe_options
from .knn import knn
from .results import FrankWolfeResult, KNNResult, Multiset, SIFTResult
from .round_multiplicities import RoundingOptions
from .sift import sift

# total="auto". bench/quality/selection.py --calibrate: of these the largest, in steps of 0.01, that
# keeps 90 % of what MAX updates gain, with and without a cap.
ALPHA = 0.08
MAX = 50


operators.check_arguments(
    "select",
    *(Problem, FrankWolfeOptions, RoundingOptions, FrankWolfeResult),
    *("counts", "counts_residual_norm"),
)


@takes_arrays
def select(
    pool: Tensor,
    query: Tensor,
    total: int | Literal["auto"],
    *,
    method: str = "hull",
    max_total: int | None = None,
    max_support: int | None = None,
    max_iters: int = 250,
    tol: float = 1e-5,
    variant: str | None = None,
    gap_tol: float | None = None,
    exchange_passes: int = 2,
    noise: float = 0.01,
    alpha: float | None = None,
    max_multiplicity: int | None = None,
    merge_duplicates: float | None = None,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> Multiset:
    """The training sequences for each prompt, and how many updates each gets, in one call.

    method="hull": :func:`hullkit.frank_wolfe`, then :func:`hullkit.round_multiplicities`, to the
        same bits. With `max_multiplicity=u` no row gets more than u updates: the weights are then
        capped at `u / total`.
    method="knn": the `total` nearest rows, one update each. With `max_multiplicity=u` it is the
        nearest ceil(total / u) rows, u updates each; the last one gets what remains.
    method="sift": :func:`hullkit.sift`; distinct rows in the order of their first choice.

    total="auto" gives each prompt its own total T <= max_total, by what the pool cannot explain.
    For the hull let r be the residual_norm at max_total. T is the first of 1, 2, 4, 6 and 10 tenths
    of max_total with `r > 1 / (alpha T)`: a prompt far from its hull stops early, one that is
    rebuilt well goes on. SIFT stops after the first step t with `sqrt(variance) > 1 / (alpha t)`. A
    larger alpha spends less. This saves choosing a total. It was not shown to score better than one
    total for all prompts.

    Options of another method must be left alone.

    Args:
        pool: candidate embeddings, one a row: `(n, d)`, shared by a batch, or `(B, n, d)`. float64,
            float32, float16 or bfloat16; strided views are fine. NumPy, CuPy and JAX arrays are
            read where they lie, and results are of their library.
        query: the prompt's embedding `(d,)`, or `(B, d)`; with "sift" also `(B, m, d)`, m vectors a
            prompt. The pool's dtype and device.
        total: updates to spend, >= 1, or "auto" ("hull" and "sift"). With a cap, and for "knn", at
            most max_multiplicity times the number of candidates.
        max_total: the most updates with "auto", >= 1; None for 50. None for a given total.
        max_support: the most rows, as in frank_wolfe. None for as many as updates, or twice that if
            max_multiplicity is less than total.
        max_iters, tol, gap_tol: when Frank-Wolfe stops, as in frank_wolfe.
        variant: as in frank_wolfe. None for "vanilla", or for "fully_corrective" if
            max_multiplicity is less than total.
        exchange_passes: of the rounding, as in round_multiplicities.
        noise: the variance of an observation for "sift", > 0.
        alpha: with "auto" > 0, None for 0.08, which was chosen on embeddings of length 1. Else as
            in :func:`hullkit.sift`.
        max_multiplicity: the most updates of one row; None for 1 ("knn") or no limit.
        merge_duplicates: eps of :func:`hullkit.duplicates`: of candidates that nearly coincide only
            the first takes part. None for all to take part. A pool `(B, n, d)` that does not lie
            in one piece is copied, unless it is one pool, expanded.
        lengths: `(B,)` integers, 0-d unbatched: only the first lengths[b] candidates count.
        candidates: `(B, n)` or `(n,)` integers: rows of a shared pool `(M, d)`, -1 = none. Results
            then name positions in `candidates[b]`. Nothing is gathered into a copy, unless
            the pool lies by columns.
        backend: None for the kernels, "reference" for the float64 oracle in NumPy.
    Returns:
        Multiset: train on pool row `rows[b, j]` with `counts[b, j]` updates, in this order. The
        counts were made from `result`. For the hull and a given total they leave
        `residual_norm[b]` of the query, to be compared with `result.residual_norm`; else it is
        None. "auto" chose `total[b]`. Without B for an unbatched call.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN and Inf,
            and for lengths or candidates out of range. A CUDA call does not wait for values: there
            such an entry gets status BROKEN (hull), indices -1 and counts 0 instead, and the others
            are right. So does one with too few candidates for total.
        NotImplementedError: the device has no kernels, or on CUDA S > 4096 with n > 4096, or more
            than :func:`hullkit.frank_wolfe` has room for there.

    >>> import hullkit, torch
    >>> chosen = hullkit.select(torch.eye(3), torch.tensor([0.7, 0.3, 0.0]), total=10)
    >>> chosen.rows[:2], chosen.counts[:2]
    (tensor([0, 1]), tensor([7, 3]))

    Numerics: where it is nearly 0, residual_norm is right to 1e-8 of the norms involved on CUDA, to
    1e-3 for half types there. Cost: that of the functions it calls; the hull's "auto" rounds up to
    five times.
    """
    check_choice("method", method, ("hull", "knn", "sift"))
    auto = isinstance(total, str) and total == "auto"
    of_hull = (max_support, max_iters, tol, variant, gap_tol, exchange_passes)
    _check_options(
        method,
        hull=any(map(_is_set, of_hull, (None, 250, 1e-5, None, None, 2))),
        sift=_is_set(noise, 0.01) or (alpha is not None and not auto),
    )
    if auto:
        most, alpha = _check_auto(method, max_total, alpha)
    elif isinstance(total, str):
        raise TypeError(f"total: expected an int or 'auto', got str ({total!r})")
    else:
        most = check_total(total)
        if max_total is not None:
            raise ValueError(f"max_total: expected None unless total='auto', got {max_total!r}")
    result: FrankWolfeResult | KNNResult | SIFTResult
    residual_norm = representatives = totals = None
    listed = candidates
    if merge_duplicates is not None:
        check_pool_query(pool, query, lengths, candidates, several=method == "sift")
        eps = check_eps("merge_duplicates", merge_duplicates)
        representatives = duplicates(
            pool, eps=eps, lengths=lengths, candidates=candidates, backend=backend
        )
        pool, candidates = _without_copies(pool, query, candidates, representatives)
    if method == "hull":
        problem = check_pool_query(pool, query, lengths, candidates)
        check_device("select", problem.pool, backend)
        exchange_passes = check_int("exchange_passes", exchange_passes, 0)
        cap = check_cap(max_multiplicity, problem.positions(), most)
        if max_support is None:
            max_support = 2 * most if cap < most else most
        if variant is None:
            variant = "fully_corrective" if cap < most else "vanilla"
        options, result = frank_wolfe_options(
            problem, max_support, max_iters, tol, gap_tol, variant, cap / most
        )
        counts = torch.empty_like(result.indices)
        residual_norm = torch.empty_like(result.residual_norm)
        run: Callable[..., None] = operators.select if backend is None else batched.select
        rounding = RoundingOptions(most, exchange_passes, cap)
        run(*problem, *options, *rounding, *result, counts, residual_norm)
        if alpha is not None:  # auto: alone it is SIFT's
            counts, totals = _rounded_to_auto(
                problem, result, counts, most, alpha, exchange_passes, cap, backend
            )
            residual_norm = None
    elif method == "knn":
        result, counts = _nearest(pool, query, most, max_multiplicity, lengths, candidates, backend)
    else:
        result = sift(
            pool,
            query,
            most,
            noise=noise,
            alpha=alpha,
            max_multiplicity=max_multiplicity,
            lengths=lengths,
            candidates=candidates,
            backend=backend,
        )
        counts = result.counts
        totals = result.num_steps if auto else None
    rows = result.indices
    if listed is not None:
        looked_up = as_int64("candidates", listed, pool.shape[0] - 1).gather(-1, rows.clamp_min(0))
        rows = torch.where(rows < 0, rows, looked_up)
    return Multiset(result.indices, counts, rows, result, residual_norm, representatives, totals)


def _check_auto(method: str, max_total: Any, alpha: Any) -> tuple[int, float]:
    """The largest total, and alpha."""
    if method == "knn":
        raise ValueError(
            "total: expected an int for method='knn', which has no certificate to stop by, "
            "got 'auto'"
        )
    most = check_int("max_total", MAX if max_total is None else max_total, 1, MAX_TOTAL)
    return most, ALPHA if alpha is None else check_positive("alpha", alpha)


def _rounded_to_auto(
    problem: Problem,
    result: FrankWolfeResult,
    counts: Tensor,
    max_total: int,
    alpha: float,
    exchange_passes: int,
    cap: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Counts, of those at max_total and at less, and the totals chosen: every rung is rounded for
    all prompts, so that none is asked, on a device, what it needs."""
    run = operators.round_multiplicities if backend is None else batched.round_multiplicities
    inputs = (problem.pool, problem.query, result.indices, result.weights, problem.candidates)
    totals = torch.full_like(result.num_iters, max_total)
    for total in reversed(ladder(max_total)[:-1]):
        rounded = torch.empty_like(counts)
        run(*inputs, *RoundingOptions(total, exchange_passes, min(cap, total)), rounded)
        enough = result.residual_norm > 1.0 / (alpha * total)
        counts = torch.where(enough[..., None], rounded, counts)
        totals = torch.where(enough, total, totals)
    return counts, torch.where(result.residual_norm.isnan(), -1, totals)


def _is_set(value: Any, default: Any) -> bool:
    """An array, which is a mistake, counts as set."""
    return value is not default and not (isinstance(value, Number) and value == default)


def _check_options(method: str, *, hull: bool, sift: bool) -> None:
    """Which options were set, by whose they are: another method would silently not heed them."""
    for given, names, owner in (
        (hull, "max_support, max_iters, tol, variant, gap_tol or exchange_passes", "hull"),
        (sift, "noise or alpha", "sift"),
    ):
        if given and method != owner:
            raise ValueError(f"method: expected {owner!r} for {names}, got {method!r}")


def _without_copies(
    pool: Tensor, query: Tensor, candidates: Tensor | None, representatives: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A shared pool, and candidates for it at the same positions: -1 where one is a copy."""
    if candidates is None and len(pool) == 0:  # no entries, each with a pool of its own
        return pool, None
    places = torch.arange(representatives.shape[-1], device=pool.device)
    own = representatives == places
    if candidates is None and pool.ndim == 3 and pool.stride(0) == 0:  # one pool, expanded
        pool, candidates = pool[0], places
    elif candidates is None:
        candidates = torch.arange(pool.shape[:-1].numel(), device=pool.device)
        candidates = candidates.view(pool.shape[:-1])
        pool = pool.flatten(0, -2)
    merged = torch.where(own, as_int64("candidates", candidates, pool.shape[0] - 1), -1)
    return pool, merged.expand(*query.shape[: min(query.ndim - 1, 1)], merged.shape[-1])


def _nearest(
    pool: Tensor,
    query: Tensor,
    total: int,
    max_multiplicity: int | None,
    lengths: Tensor | None,
    candidates: Tensor | None,
    backend: str | None,
) -> tuple[KNNResult, Tensor]:
    positions = check_pool_query(pool, query, lengths, candidates).positions()
    cap = 1 if max_multiplicity is None else check_cap(max_multiplicity, positions, total)
    k = -(-total // cap)
    if k > positions:
        raise ValueError(
            f"total: expected at most 1 for each of {positions} candidates, got {total}"
        )
    result = knn(pool, query, k, lengths=lengths, candidates=candidates, backend=backend)
    counts = torch.full_like(result.indices, cap)
    counts[..., -1] = total - cap * (k - 1)
    if result.indices.is_cpu and lengths is None and candidates is None:
        return result, counts  # knn has checked that there are enough, and finite
    short = (result.indices < 0).any(-1, keepdim=True)
    if has_values(short):
        if bool(short.any()):
            entries = short.nonzero()[:, 0].tolist()
            where = f" for entries {entries} with fewer" if short.ndim > 1 else ""
            raise ValueError(
                f"total: expected at most {cap} for each of the valid candidates for "
                f"method='knn', got {total}{where}"
            )
        return result, counts
    marked = KNNResult(
        result.indices.masked_fill(short, -1), result.values.masked_fill(short, float("nan"))
    )
    return marked, counts.masked_fill(short, 0)
