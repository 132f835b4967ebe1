"""From a prompt and its candidates to a multiset of training sequences: `select`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import (
    MAX_TOTAL,
    as_int64,
    check_cap,
    check_choice,
    check_device,
    check_int,
    check_positive,
    check_total,
)
from ..native import operators
from ..reference import batched, ladder
from ._arrays import takes_arrays
from ._problem import Problem, check_pool_query
from .duplicates import duplicates
from .frank_wolfe import frank_wolfe_options
from .knn import knn
from .results import FrankWolfeResult, KNNResult, Multiset, SIFTResult
from .sift import sift

# total="auto". bench/quality/selection.py --calibrate: of these the largest, in steps of 0.01, that
# keeps 90 % of what MAX updates gain, with and without a cap.
ALPHA = 0.08
MAX = 50


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
    """A multiset of `total` training sequences for each prompt, in one call.

    method="hull": :func:`frank_wolfe`, then :func:`hullkit.round_multiplicities` (HullFT), to the
    same bits; the Gram matrix of the support is not computed a second time where the Gram matrix of
    the pool is at hand (CPU; CUDA with n <= 4096). With `max_multiplicity=u` no example gets more
    than u updates: frank_wolfe runs with `max_weight = u / total`, rounding with the same u.
    method="knn": the `total` nearest, one update each; with max_multiplicity = u the nearest
    ceil(total / u), u updates each, the last one what remains.
    method="sift": :func:`sift`, the distinct rows in order of their first choice.

    total="auto": each prompt has its own, T <= max_total. SIFT stops there (`alpha` of
    :func:`sift`): after the first step t with `sqrt(variance) > 1 / (alpha t)`. The hull does the
    same with what no weights can reconstruct, the residual_norm r of frank_wolfe at max_total: T is
    the first of 1, 2, 4, 6 and 10 tenths of max_total (rounded up) with `r > 1 / (alpha T)`,
    max_total if there is none (`hullkit.reference.auto_total`), and the weights of that one run are
    rounded to T. So updates go where the pool has more to say, about in proportion to 1 / r. It
    saves choosing a total; it was not shown to score better than one total for all prompts with the
    same mean passes (docs: What a selection is worth).

    Options of another method must be left alone.

    Args:
        pool, query, lengths, candidates, backend: as in :func:`lmo`, `query` for `direction`.
        total: updates to spend, 1 <= total; at most the number of valid candidates for "knn".
            "auto" for "hull" and "sift": see above.
        max_total: with "auto", the most updates, >= 1; None for 50. Otherwise None.
        max_support: None for `total` or max_total: more examples than updates cannot all be
            visited. If max_multiplicity is less than that, None for twice that: such a run starts
            from the total / max_multiplicity nearest, and some of them leave again.
        max_iters, tol, gap_tol: as in :func:`frank_wolfe`; exchange_passes: as in
            round_multiplicities.
        variant: as in frank_wolfe; None for "vanilla", or "fully_corrective", which is faster and
            exact there, if max_multiplicity is less than total.
        noise: as in :func:`sift`, which also takes queries `(B, m, d)`.
        alpha: with "auto" > 0, None for 0.08, which is made for embeddings of length 1: the less,
            the more updates. Otherwise as in sift.
        max_multiplicity: updates of one row at most; None for 1 ("knn") or no limit. ValueError if
            `total` needs more. With reuse_schedule(refresh_interval=u) an example costs one pass.
        merge_duplicates: eps of :func:`hullkit.duplicates`: of candidates nearly the same only the
            first takes part, and what any of them would get is its; None for all to take part. A
            pool `(B, n, d)` whose rows are not evenly spaced in memory is copied for it.
    Returns:
        Multiset(indices, counts, rows, result, residual_norm, representatives, total):
        `rows[b, j]` is the pool row to train on `counts[b, j]` times, in this order;
        `residual_norm[b]` is what the counts of "hull" leave of the query, the result's what the
        weights do; without the leading B for an unbatched call. Where it is nearly 0, residual_norm
        is right to 1e-8 of the norms involved on CUDA, for half types there to 1e-3: it is made of
        products, not of rows. With "auto", `total[b]` is the sum of `counts[b]` (-1 for a broken
        entry of "hull" on a CUDA device), and residual_norm is None.
    Raises:
        As the functions it calls: on CUDA NotImplementedError for n > 4096 with S > 4096. Entries
        of "hull" with too few candidates for max_multiplicity: ValueError, on CUDA status BROKEN.

    Cost: that of the functions it calls; "auto" with "hull" that of max_total, and of up to four
        round_multiplicities more.
    """
    check_choice("method", method, ("hull", "knn", "sift"))
    auto = isinstance(total, str) and total == "auto"
    _check_options(
        method,
        hull=(max_support, max_iters, tol, variant, gap_tol, exchange_passes)
        != (None, 250, 1e-5, None, None, 2),
        sift=noise != 0.01 or (alpha is not None and not auto),
    )
    if auto:
        most, alpha = _check_auto(method, max_total, alpha)
    else:
        most = check_total(total)
        if max_total is not None:
            raise ValueError(f"max_total: expected None unless total='auto', got {max_total!r}")
    result: FrankWolfeResult | KNNResult | SIFTResult
    residual_norm = representatives = totals = None
    listed = candidates
    if merge_duplicates is not None:
        check_pool_query(pool, query, lengths, candidates, several=method == "sift")
        representatives = duplicates(
            pool, eps=merge_duplicates, lengths=lengths, candidates=candidates, backend=backend
        )
        pool, candidates = _without_copies(pool, query, candidates, representatives)
    if method == "hull":
        problem = check_pool_query(pool, query, lengths, candidates)
        check_device("select", problem.pool, backend)
        check_int("exchange_passes", exchange_passes, 0)
        cap = check_cap(max_multiplicity, problem.positions, most)
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
        run(*problem, *options, most, exchange_passes, cap, *result, counts, residual_norm)
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
        looked_up = as_int64("candidates", listed).gather(-1, rows.clamp_min(0))
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
        run(*inputs, total, exchange_passes, min(cap, total), rounded)
        enough = result.residual_norm > 1.0 / (alpha * total)
        counts = torch.where(enough[..., None], rounded, counts)
        totals = torch.where(enough, total, totals)
    return counts, torch.where(result.residual_norm.isnan(), -1, totals)


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
) -> tuple[Tensor, Tensor]:
    """A shared pool, and candidates for it at the same positions: -1 where one is a copy."""
    own = representatives == torch.arange(representatives.shape[-1], device=pool.device)
    if candidates is None:
        candidates = torch.arange(pool.shape[:-1].numel(), device=pool.device)
        candidates = candidates.view(pool.shape[:-1])
        pool = pool.flatten(0, -2)
    merged = torch.where(own, as_int64("candidates", candidates), -1)
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
    cap = 1
    if max_multiplicity is not None:
        cap = check_cap(
            max_multiplicity, check_pool_query(pool, query, lengths, candidates).positions, total
        )
    k = -(-total // cap)
    result = knn(pool, query, k, lengths=lengths, candidates=candidates, backend=backend)
    counts = torch.full_like(result.indices, cap)
    counts[..., -1] = total - cap * (k - 1)
    if lengths is None and candidates is None:
        return result, counts  # knn has checked that there are enough
    short = (result.indices < 0).any(-1)
    if bool(short.any()):
        raise ValueError(
            f"total: expected at most {cap} for each of the valid candidates for "
            f"method='knn', got {total} for entries {short.nonzero().flatten().tolist()} with fewer"
        )
    return result, counts
