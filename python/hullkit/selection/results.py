# SPDX-License-Identifier: Apache-2.0
"""The results of selections. Every result carries its certificate."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from ..native.kernels import STATUSES


class Status(IntEnum):
    """Why a Frank-Wolfe run ended; `FrankWolfeResult.status` holds these numbers.

    Attributes:
        CONVERGED: 0: the residual is shorter than tol.
        MAX_SUPPORT: 1: max_support distinct vertices were touched. With a cap and
            variant="vanilla" also if the next step, towards a mean of several rows, would touch
            more than that.
        MAX_ITERS: 2: max_iters steps were taken.
        STALLED: 3: no step improves the iterate by more than rounding, and it is optimal. With
            variant="vanilla" the step's direction, from the iterate to a vertex, may also be
            shorter than 1e-6 in the embeddings' unit. Short embeddings end there before the
            optimum; dual_gap bounds how far from it.
        BROKEN: 4: the entry cannot be solved: NaN, Inf, lengths or candidates out of range, too few
            candidates for max_weight or max_multiplicity. On CUDA only; a CPU call raises.
        GAP_TOL: 5: the dual gap is at most gap_tol.

    >>> import hullkit
    >>> hullkit.Status(2).name
    'MAX_ITERS'
    """

    CONVERGED = 0
    MAX_SUPPORT = 1
    MAX_ITERS = 2
    STALLED = 3
    BROKEN = 4
    GAP_TOL = 5


if {status.name: status.value for status in Status} != STATUSES:
    raise ImportError(f"hullkit.Status: expected {STATUSES}, as compiled, got {list(Status)}")


class LMOResult(NamedTuple):
    """The answer of :func:`hullkit.lmo`. Without B for an unbatched call.

    Attributes:
        index: `(B,)` int64, the position of the smallest product; -1 for a broken entry on CUDA.
        value: `(B,)` float64, that product; NaN for a broken entry on CUDA.

    >>> import hullkit, torch
    >>> hullkit.lmo(torch.eye(2), torch.tensor([1.0, 2.0]))
    LMOResult(index=tensor(0), value=tensor(1., dtype=torch.float64))
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    value: Tensor


class KNNResult(NamedTuple):
    """The answer of :func:`hullkit.knn`. Without B for an unbatched call.

    Attributes:
        indices: `(B, k)` int64, the nearest first; -1 is padding.
        values: `(B, k)` float64, their inner products with the query; -inf is padding. A broken
            entry on CUDA has indices -1 and values NaN.

    >>> import hullkit, torch
    >>> hullkit.knn(torch.eye(2), torch.tensor([1.0, 2.0]), 1).indices
    tensor([1])
    """

    indices: Tensor
    values: Tensor


class FrankWolfeResult(NamedTuple):
    """The answer of :func:`hullkit.frank_wolfe`: weights and their certificates.

    S is at most max_support, the number of candidates, and the rows that max_iters steps can touch.
    Without B for an unbatched call.

    Attributes:
        indices: `(B, S)` int64 positions of the support, the heaviest first; -1 is padding.
        weights: `(B, S)` float64, at least 0, with sum 1; 0 is padding.
        support_size: `(B,)` int64, how many entries of a row are no padding.
        residual_norm: `(B,)` float64, the length of `query - weights @ pool[indices]`, in the
            embeddings' unit.
        dual_gap: `(B,)` float64, an upper bound on how far `1/2 * residual_norm**2` is from its
            minimum, in the unit of a squared length. Rounding of the products may take it below 0.
        num_iters: `(B,)` int64, steps taken.
        status: `(B,)` int64, the number of a :class:`hullkit.Status`.

    >>> import hullkit, torch
    >>> hullkit.frank_wolfe(torch.eye(2), torch.tensor([1.0, 0.0])).support_size
    tensor(1)
    """

    indices: Tensor
    weights: Tensor
    support_size: Tensor
    residual_norm: Tensor
    dual_gap: Tensor
    num_iters: Tensor
    status: Tensor


class SIFTResult(NamedTuple):
    """The answer of :func:`hullkit.sift`. Without B for an unbatched call.

    S is total, or the number of candidates if that is less.

    Attributes:
        order: `(B, total)` int64 positions in order of choice, repeats included; -1 from where a
            query stopped.
        variance: `(B, total)` float64, the query's variance after each step, in the unit of a
            squared length; it stays from where a query stopped.
        indices: `(B, S)` int64, the distinct choices in order of their first; -1 is padding.
        counts: `(B, S)` int64, how often each was chosen; 0 is padding.
        num_steps: `(B,)` int64, steps taken.

    >>> import hullkit, torch
    >>> hullkit.sift(torch.eye(2), torch.tensor([1.0, 0.0]), 3).counts
    tensor([3, 0])
    """

    order: Tensor
    variance: Tensor
    indices: Tensor
    counts: Tensor
    num_steps: Tensor


class Multiset(NamedTuple):
    """A selection to finetune on: example `rows[j]` gets `counts[j]` updates, in this order.

    Without B for an unbatched call. `rows[counts > 0]` leaves padding out.

    Attributes:
        indices: `(B, S)` int64 positions; the heaviest, nearest or first chosen come first; -1 is
            padding.
        counts: `(B, S)` int64 updates, with sum total (or the steps taken until alpha stopped);
            0 is padding.
        rows: `(B, S)` int64 rows of the pool: `indices`, looked up in `candidates` if there are
            any; -1 is padding.
        result: the answer that the counts were made from, with its certificates.
        residual_norm: `(B,)` float64, the length of `query - (counts / total) @ pool[rows]`.
            Rounding cost what it exceeds `result.residual_norm` by. None for methods that do not
            round, and for "auto".
        representatives: `(B, n)` int64, the answer of :func:`hullkit.duplicates` if near copies
            were merged, else None; `(n,)` for a pool that a batch shares without lengths and
            candidates.
        total: `(B,)` int64, the totals that "auto" chose; None for a total that was given.

    >>> import hullkit, torch
    >>> hullkit.select(torch.eye(2), torch.tensor([1.0, 0.0]), 4, method="sift").counts
    tensor([4, 0])
    """

    indices: Tensor
    counts: Tensor
    rows: Tensor
    result: FrankWolfeResult | KNNResult | SIFTResult
    residual_norm: Tensor | None = None
    representatives: Tensor | None = None
    total: Tensor | None = None
