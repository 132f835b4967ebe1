# SPDX-License-Identifier: Apache-2.0
"""The results of selections. Every result carries its certificate."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from ..native.kernels import STATUSES


class Status(IntEnum):
    """Why a Frank-Wolfe run ended; `FrankWolfeResult.status` holds these numbers.

    >>> import hullkit
    >>> hullkit.Status(2).name
    'MAX_ITERS'
    """

    CONVERGED = 0  # ||query - iterate|| < tol
    MAX_SUPPORT = 1  # max_support distinct vertices touched
    MAX_ITERS = 2  # max_iters steps taken
    STALLED = 3  # no step improves the iterate by more than rounding: it is optimal
    # on CUDA devices, where the CPU raises: NaN, Inf, lengths or candidates out of range, too few
    # candidates for max_weight or max_multiplicity
    BROKEN = 4
    GAP_TOL = 5  # dual gap <= gap_tol


if {status.name: status.value for status in Status} != STATUSES:
    raise ImportError(f"hullkit.Status: expected {STATUSES}, as compiled, got {list(Status)}")


class LMOResult(NamedTuple):
    """The answer of :func:`hullkit.lmo`.

    >>> import hullkit, torch
    >>> hullkit.lmo(torch.eye(2), torch.tensor([1.0, 2.0]))
    LMOResult(index=tensor(0), value=tensor(1., dtype=torch.float64))
    """

    index: Tensor  # type: ignore[assignment]  # [B] int64; hides tuple.index
    value: Tensor  # [B] float64


class KNNResult(NamedTuple):
    """The answer of :func:`hullkit.knn`.

    >>> import hullkit, torch
    >>> hullkit.knn(torch.eye(2), torch.tensor([1.0, 2.0]), 1).indices
    tensor([1])
    """

    indices: Tensor  # [B, k] int64, nearest first, -1 = padding
    values: Tensor  # [B, k] float64 inner products, -inf = padding


class FrankWolfeResult(NamedTuple):
    """The answer of :func:`hullkit.frank_wolfe`: weights and their certificates.

    >>> import hullkit, torch
    >>> hullkit.frank_wolfe(torch.eye(2), torch.tensor([1.0, 0.0])).support_size
    tensor(1)
    """

    indices: Tensor  # [B, S] int64 by falling weight, -1 = padding
    weights: Tensor  # [B, S] float64, 0 = padding
    support_size: Tensor  # [B] int64
    residual_norm: Tensor  # [B] float64
    dual_gap: Tensor  # [B] float64
    num_iters: Tensor  # [B] int64
    status: Tensor  # [B] int64, see Status


class SIFTResult(NamedTuple):
    """The answer of :func:`hullkit.sift`.

    >>> import hullkit, torch
    >>> hullkit.sift(torch.eye(2), torch.tensor([1.0, 0.0]), 3).counts
    tensor([3, 0])
    """

    order: Tensor  # [B, total] int64 in order of choice, repeats included, -1 from where it stopped
    variance: Tensor  # [B, total] float64 after each step; stays from where it stopped
    indices: Tensor  # [B, S] int64 distinct choices in order of their first, -1 = padding
    counts: Tensor  # [B, S] int64 how often each was chosen, 0 = padding
    num_steps: Tensor  # [B] int64


class Multiset(NamedTuple):
    """A selection to finetune on: example `rows[j]` gets `counts[j]` updates, in this order.

    >>> import hullkit, torch
    >>> hullkit.select(torch.eye(2), torch.tensor([1.0, 0.0]), 4, method="sift").counts
    tensor([4, 0])
    """

    indices: Tensor  # [B, S] int64 positions; heaviest, nearest or chosen first; -1 = padding
    counts: Tensor  # [B, S] int64, sum = total (or steps taken until alpha stopped), 0 = padding
    rows: Tensor  # [B, S] int64 rows of the pool: indices, looked up in candidates if there are any
    result: FrankWolfeResult | KNNResult | SIFTResult  # counts were made from it; certificates
    # [B] float64 ||query - sum_j counts[j] / total * rows[j]||, to be compared with
    # result.residual_norm: rounding cost the difference. None for methods that do not round and for
    # "auto".
    residual_norm: Tensor | None = None
    # [B, n] int64, the answer of hullkit.duplicates if near copies were merged; [n] for a pool that
    # a batch shares without lengths and candidates
    representatives: Tensor | None = None
    # [B] int64, the totals that "auto" chose; None for a total that was given
    total: Tensor | None = None
