# SPDX-License-Identifier: Apache-2.0
"""The variants of Frank-Wolfe with an active set, and those over the capped simplex."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._checks import CAP_SLACK
from .lmo import Array, row_dots

_GAIN = 1e-14  # what a step must gain by the unit, of the products that its score is a sum of
_AT_BOUND = 1e-14  # a weight so close to a bound has met it
_TINY = np.finfo(np.float64).tiny


class _State(NamedTuple):
    pool: Array
    weights: Array  # [n]
    scores: Array  # [n] <residual, pool_i>
    iterate: Array
    vertex: Array  # [n] weights of the LMO's answer
    cap: float
    free: list[int]  # weights strictly between the bounds, or about to be; fully corrective only
    lengths: Array  # [n] norms of the rows
    query_length: float

    def gain(self, length: float) -> float:
        """What a step must gain by the unit that brings in or moves a row of this length: less is
        rounding. Scores are sums of products with the query and with the rows that have weight."""
        mean = float(self.weights @ self.lengths)
        return _GAIN * max(length, mean) * max(self.query_length, mean)


def capped_vertex(scores: Array, max_weight: float) -> tuple[Array, NDArray[np.int64]]:
    """argmax <scores, w> over {0 <= w_i <= max_weight, sum w = 1}: the best ceil(1 / max_weight)
    candidates (lowest index on a tie), the last one with what is left. Also these, best first."""
    size = 1 if max_weight >= 1 else int(np.ceil((1 - CAP_SLACK) / max_weight))
    best = np.argsort(-scores, kind="stable")[:size]
    weights = np.zeros(len(scores))
    weights[best] = min(max_weight, 1.0)
    weights[best[-1]] = min(1 - (size - 1) * max_weight, max_weight) if size > 1 else 1.0
    return weights, best


def active_set(
    pool: Array,
    query: Array,
    max_support: int | None,
    max_iters: int,
    tol: float,
    gap_tol: float,
    variant: str,
    max_weight: float,
) -> tuple[NDArray[np.int64], Array, float, float, int, str]:
    """The fields of a FrankWolfeOutcome; gap_tol = -inf: off.

    Fully corrective weights are those of the same problem at any scale, given tol and gap_tol at
    that scale, while squares are within float64: lengths of 1e-150 to 1e150.
    """
    limit = len(pool) + 1 if max_support is None else max_support
    weights, best = capped_vertex(row_dots(pool, query), max_weight)
    cap = max_weight if len(best) > 1 else np.inf
    touched = set(best.tolist())
    free = [int(i) for i in best[-1:] if weights[i] < cap]
    lengths, query_length = np.linalg.norm(pool, axis=1), float(np.linalg.norm(query))
    num_iters = 0
    status = "MAX_ITERS"
    while len(touched) < limit and num_iters < max_iters:
        iterate = weights @ pool
        residual = query - iterate
        scores = row_dots(pool, residual)
        if np.linalg.norm(residual) < tol:
            status = "CONVERGED"
            break
        vertex, _ = capped_vertex(scores, max_weight)
        if vertex @ scores - residual @ iterate <= gap_tol:
            status = "GAP_TOL"
            break
        state = _State(pool, weights, scores, iterate, vertex, cap, free, lengths, query_length)
        moved = _STEPS[variant](state)
        if moved is None:
            status = "STALLED"
            break
        reached = touched | set(moved[1])
        if len(reached) > limit:
            status = "MAX_SUPPORT"
            break
        weights, touched = moved[0], reached
        num_iters += 1
    if status == "MAX_ITERS" and len(touched) >= limit:
        status = "MAX_SUPPORT"
    indices = np.array(sorted(touched))
    indices = indices[np.argsort(-weights[indices], kind="stable")]
    residual = query - weights[indices] @ pool[indices]
    scores = row_dots(pool, residual)
    gap = capped_vertex(scores, max_weight)[0] @ scores - residual @ (query - residual)
    norm = float(np.linalg.norm(residual))
    return indices, weights[indices], norm, float(gap), num_iters, status


_Moved = tuple[Array, list[int]]  # weights after a step, and the vertices it may have touched


def _toward(s: _State) -> _Moved | None:
    direction = s.vertex @ s.pool - s.iterate
    slope = s.vertex @ s.scores - s.weights @ s.scores
    length_squared = direction @ direction
    if length_squared < 1e-12 or slope <= s.gain(float(s.vertex @ s.lengths)):
        return None
    step = min(float(slope / length_squared), 1.0)
    weights = np.minimum((1 - step) * s.weights + step * s.vertex, s.cap)
    return weights, np.flatnonzero(s.vertex).tolist()


def _worst(s: _State) -> int:
    return int(np.argmin(np.where(s.weights > 0, s.scores, np.inf)))


def _away(s: _State) -> _Moved | None:
    best, worst = int(np.argmax(s.scores)), _worst(s)
    level = s.weights @ s.scores
    if s.scores[best] - level <= s.gain(s.lengths[best]):
        return None
    forward = s.scores[best] - level >= level - s.scores[worst]
    i = best if forward else worst
    direction = s.pool[i] - s.iterate
    longest = 1.0 if forward else float(s.weights[i] / (1 - s.weights[i]))
    step: float = min(float(abs(s.scores[i] - level) / max(direction @ direction, _TINY)), longest)
    share: float = step if forward else -step
    weights = (1 - share) * s.weights
    weights[i] = 0.0 if not forward and step == longest else max(weights[i] + share, 0.0)
    return weights, [i]


def _pairwise(s: _State) -> _Moved | None:
    below = np.where(s.weights < s.cap, s.scores, -np.inf)
    best, worst = int(np.argmax(below)), _worst(s)
    if below[best] - s.scores[worst] <= s.gain(s.lengths[[best, worst]].max()):
        return None
    direction = s.pool[best] - s.pool[worst]
    room, own = s.cap - s.weights[best], s.weights[worst]
    slope = s.scores[best] - s.scores[worst]
    step = min(slope / max(direction @ direction, _TINY), room, own)
    weights = s.weights.copy()
    weights[best] = s.cap if step == room else weights[best] + step
    weights[worst] = 0.0 if step == own else own - step
    return weights, [best]


def _corrective(s: _State) -> _Moved | None:
    """Frees the candidate that gains most, then solves for all free ones (Wolfe's minor cycles)."""
    free = s.free
    if not free:
        free.append(_worst(s))
    level = s.scores[free].mean()
    bound = ~np.isin(np.arange(len(s.weights)), free)
    # A row much longer than the rest would come and go for ever where its weight is so little that
    # it counts as none.
    enters = s.scores - level > _AT_BOUND * s.lengths**2
    rises = np.where(bound & (s.weights == 0) & enters, s.scores - level, -np.inf)
    falls = np.where(bound & (s.weights == s.cap), level - s.scores, -np.inf)
    entering = int(np.argmax(rises if rises.max() >= falls.max() else falls))
    longest = s.lengths[free].max()
    joined = max(rises.max(), falls.max()) > s.gain(max(longest, s.lengths[entering]))
    if joined:
        free.append(entering)
    elif np.ptp(s.scores[free]) <= s.gain(longest):
        return None
    weights = s.weights.copy()
    residual_scores = s.scores[free]
    gram = s.pool @ s.pool[free].T  # [n, free]
    moved = False
    while len(free) > 1:
        size = len(free)
        # In units of its largest entry: lstsq drops what is small beside the rest, and the row of
        # ones, by which weights sum to 1, must not be.
        unit = gram[free].max()
        system = np.ones((size + 1, size + 1))
        system[:size, :size] = gram[free] / unit
        system[size, size] = 0.0
        right = np.append(residual_scores / unit, 0.0)
        change = np.linalg.lstsq(system, right, rcond=None)[0][:size]
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(change < 0, weights[free], s.cap - weights[free])
            steps = np.where(change != 0, room / np.abs(change), np.inf)
        blocking = int(np.argmin(steps))
        step = min(float(steps[blocking]), 1.0)
        moved |= step > 0 and bool(change.any())
        residual_scores = residual_scores - step * gram[free] @ change
        there = weights[free] + step * change
        there[there < _AT_BOUND] = 0.0
        there[s.cap - there < _AT_BOUND] = s.cap
        weights[free] = there
        if step >= 1.0:
            break
        weights[free[blocking]] = s.cap if change[blocking] > 0 else 0.0
        # As one falls from the cap to 0, another may rise from 0 to the cap: both leave.
        met = (step > 0) & ((weights[free] == 0) | (weights[free] == s.cap))
        met[blocking] = True
        free[:] = np.array(free)[~met].tolist()
        residual_scores = residual_scores[~met]
        gram = gram[:, ~met]
    if not moved and not (joined and entering in free):
        return None
    return weights, [entering] if joined else []


_STEPS: dict[str, Callable[[_State], _Moved | None]] = {
    "vanilla": _toward,
    "away": _away,
    "pairwise": _pairwise,
    "fully_corrective": _corrective,
}
