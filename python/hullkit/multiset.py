"""From a prompt and its candidates to a multiset of training sequences: `select`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._arrays import takes_arrays
from ._checks import check_cap, check_choice, check_device, check_int, check_pool_query, check_total
from .greedy import SIFTResult, sift
from .reference import batched
from .selection import FrankWolfeResult, KNNResult, frank_wolfe_options, knn


class Multiset(NamedTuple):
    """A selection to finetune on: example `rows[j]` gets `counts[j]` updates, in this order."""

    indices: Tensor  # [B, S] int64 positions; heaviest, nearest or chosen first; -1 = padding
    counts: Tensor  # [B, S] int64, sum = total (or steps taken until alpha stopped), 0 = padding
    rows: Tensor  # [B, S] int64 rows of the pool: indices, looked up in candidates if there are any
    result: FrankWolfeResult | KNNResult | SIFTResult  # what counts were made from; certificates


@takes_arrays
def select(
    pool: Tensor,
    query: Tensor,
    total: int,
    *,
    method: str = "hull",
    max_support: int | None = None,
    max_iters: int = 250,
    tol: float = 1e-5,
    exchange_passes: int = 2,
    noise: float = 0.01,
    alpha: float | None = None,
    max_multiplicity: int | None = None,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> Multiset:
    """A multiset of `total` training sequences for each prompt, in one call.

    method="hull": :func:`frank_wolfe`, then :func:`hullkit.round_multiplicities` (HullFT), to the
    same bits; the Gram matrix of the support is not computed a second time where the Gram matrix of
    the pool is at hand (CPU; CUDA with n <= 4096).
    method="knn": the `total` nearest, one update each; with max_multiplicity = u the nearest
    ceil(total / u), u updates each, the last one what remains.
    method="sift": :func:`sift`, the distinct rows in order of their first choice.

    Options of another method must be left alone.

    Args:
        pool, query, lengths, candidates, backend: as in :func:`lmo`, `query` for `direction`.
        total: updates to spend, 1 <= total; at most the number of valid candidates for "knn".
        max_support: None for `total`: more examples than updates cannot all be visited.
        max_iters, tol: as in :func:`frank_wolfe`; exchange_passes: as in round_multiplicities.
        noise, alpha: as in :func:`sift`, which also takes queries `(B, m, d)`.
        max_multiplicity: updates of one row at most, for "knn" and "sift"; None for 1 ("knn") or no
            limit ("sift"). ValueError if `total` needs more.
    Returns:
        Multiset(indices, counts, rows, result): `rows[b, j]` is the pool row to train on
        `counts[b, j]` times, in this order; without the leading B for an unbatched call.
    Raises:
        As the functions it calls: on CUDA NotImplementedError for n > 4096 with S > 4096.
    """
    check_choice("method", method, ("hull", "knn", "sift"))
    check_total(total)
    _check_options(
        method,
        hull=(max_support, max_iters, tol, exchange_passes) != (None, 250, 1e-5, 2),
        sift=(noise, alpha) != (0.01, None),
        capped=max_multiplicity is not None,
    )
    result: FrankWolfeResult | KNNResult | SIFTResult
    if method == "hull":
        problem = check_pool_query(pool, query, lengths, candidates)
        check_device("select", problem.pool, backend)
        check_int("exchange_passes", exchange_passes, 0)
        options, result = frank_wolfe_options(
            problem, total if max_support is None else max_support, max_iters, tol
        )
        counts = torch.empty_like(result.indices)
        run = _ops.select if backend is None else batched.select
        run(*problem, *options, total, exchange_passes, *result, counts)
    elif method == "knn":
        result, counts = _nearest(
            pool, query, total, max_multiplicity, lengths, candidates, backend
        )
    else:
        result = sift(
            pool,
            query,
            total,
            noise=noise,
            alpha=alpha,
            max_multiplicity=max_multiplicity,
            lengths=lengths,
            candidates=candidates,
            backend=backend,
        )
        counts = result.counts
    rows = result.indices
    if candidates is not None:
        looked_up = candidates.to(torch.int64).gather(-1, rows.clamp_min(0))
        rows = torch.where(rows < 0, rows, looked_up)
    return Multiset(result.indices, counts, rows, result)


def _check_options(method: str, *, hull: bool, sift: bool, capped: bool) -> None:
    """Which options were set, by whose they are: another method would silently not heed them."""
    for given, names, methods in (
        (hull, "max_support, max_iters, tol or exchange_passes", ("hull",)),
        (sift, "noise or alpha", ("sift",)),
        (capped, "max_multiplicity", ("knn", "sift")),
    ):
        if given and method not in methods:
            expected = " or ".join(repr(name) for name in methods)
            raise ValueError(f"method: expected {expected} for {names}, got {method!r}")


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
