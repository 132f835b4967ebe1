# SPDX-License-Identifier: Apache-2.0
"""What must hold of a result: equal to the oracle, or parted from it where rounding decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import hullkit
import numpy as np
import torch
from hullkit import reference
from numpy.typing import NDArray

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
WEIGHT_TOL = 1e-12


class Outcome(NamedTuple):
    """One Frank-Wolfe result, kernel's or oracle's, without padding."""

    indices: NDArray[np.int64]
    weights: Array
    support_size: int
    residual_norm: float
    dual_gap: float
    num_iters: int
    status: str

    def dense(self, n: int) -> Array:
        weights = np.zeros(n)
        weights[self.indices] = self.weights
        return weights


def kernel_outcome(pool: Array, query: Array, **options: Any) -> Outcome:
    result = hullkit.frank_wolfe(torch.from_numpy(pool), torch.from_numpy(query), **options)
    size = int(result.support_size)
    assert (result.indices[size:] == -1).all(), "padding of indices"
    assert (result.weights[size:] == 0).all(), "padding of weights"
    return Outcome(
        result.indices[:size].numpy(),
        result.weights[:size].numpy(),
        size,
        float(result.residual_norm),
        float(result.dual_gap),
        int(result.num_iters),
        hullkit.Status(int(result.status)).name,
    )


def oracle_outcome(pool: Array, query: Array, **options: Any) -> Outcome:
    outcome = reference.frank_wolfe(pool, query, **options)
    return Outcome(outcome.indices, outcome.weights, len(outcome.indices), *outcome[2:])


def length_scale(pool: Array, query: Array) -> float:
    return float(np.linalg.norm(pool, axis=1).max() + np.linalg.norm(query))


def differences(kernel: Outcome, oracle: Outcome, scale: float) -> list[str]:
    """The fields in which two outcomes part."""
    parted = [
        name
        for name in ("support_size", "num_iters", "status")
        if getattr(kernel, name) != getattr(oracle, name)
    ]
    if not np.array_equal(kernel.indices, oracle.indices):
        parted.append("indices")
    elif np.abs(kernel.weights - oracle.weights).max() > WEIGHT_TOL:
        parted.append("weights")
    if abs(kernel.residual_norm - oracle.residual_norm) > 1e-12 * scale:
        parted.append("residual_norm")
    if abs(kernel.dual_gap - oracle.dual_gap) > 1e-12 * scale**2:
        parted.append("dual_gap")
    return parted


def assert_exact(pool: Array, query: Array, **options: Any) -> None:
    kernel = kernel_outcome(pool, query, **options)
    oracle = oracle_outcome(pool, query, **options)
    parted = differences(kernel, oracle, length_scale(pool, query))
    assert not parted, f"{parted}:\nkernel {kernel}\noracle {oracle}"


def assert_same_path_or_tie(pool: Array, query: Array, **options: Any) -> bool:
    """Equal to the oracle (returns True), or parted at a step that rounding decides (False).

    Where results differ, the step at which the paths part is found by bisection over max_iters, and
    the two decisions there are judged in extended precision at the iterates both still shared.
    """
    scale = length_scale(pool, query)
    options.setdefault("max_iters", 250)
    kernel = kernel_outcome(pool, query, **options)
    oracle = oracle_outcome(pool, query, **options)
    if not differences(kernel, oracle, scale):
        return True
    # Both are within their dual gap of the optimum, whatever path led there.
    slack = max(kernel.dual_gap, oracle.dual_gap) + 64 * EPS * scale**2
    assert abs(kernel.residual_norm**2 - oracle.residual_norm**2) / 2 <= slack

    def parted(max_iters: int) -> bool:
        limited = {**options, "max_iters": max_iters}
        one, other = kernel_outcome(pool, query, **limited), oracle_outcome(pool, query, **limited)
        return not _same_state(one, other, len(pool))

    if not parted(options["max_iters"]):
        # One state, written down in two orders: only the order of equal weights may differ.
        names = set(differences(kernel, oracle, scale))
        assert names <= {"indices"}, f"{names}:\nkernel {kernel}\noracle {oracle}"
        assert np.abs(kernel.weights - oracle.weights).max() <= WEIGHT_TOL
        return False
    if parted(0):
        products = pool.astype(np.longdouble) @ query.astype(np.longdouble)
        first = [int(run(pool, query, max_iters=0).indices[0]) for run in _PROCEDURES]
        tie = abs(products[first[0]] - products[first[1]])
        assert tie <= 64 * EPS * scale**2, f"first vertex: {tie} is no tie"
        return False
    common, after = 0, options["max_iters"]
    while after - common > 1:
        middle = (common + after) // 2
        common, after = (common, middle) if parted(middle) else (middle, after)
    _judge_step(pool, query, options, common, scale)
    return False


def _same_state(one: Outcome, other: Outcome, n: int) -> bool:
    return (
        one.num_iters == other.num_iters
        and one.status == other.status
        and set(one.indices) == set(other.indices)
        and np.abs(one.dense(n) - other.dense(n)).max() <= WEIGHT_TOL
    )


_PROCEDURES = (kernel_outcome, oracle_outcome)


class _Step(NamedTuple):
    weights: Array  # [n] after it
    stopped: bool  # at the iterate, without a move
    near: set[str]  # stopping tests whose quantity is within rounding of its threshold
    chosen: int  # the vertex moved to, -1 if the weights do not tell
    margin: float  # score of the best vertex less that of the chosen one
    scores: NDArray[np.longdouble]
    length: float  # from the iterate to the chosen vertex


def _observe(
    run: Callable[..., Outcome], pool: Array, query: Array, options: dict[str, Any], at: int
) -> _Step:
    """What the procedure did at iterate `at`, from its own weights before and after."""
    before = run(pool, query, **{**options, "max_iters": at})
    after = run(pool, query, **{**options, "max_iters": at + 1})
    rows, target = pool.astype(np.longdouble), query.astype(np.longdouble)
    weights = before.dense(len(pool))
    iterate = weights.astype(np.longdouble) @ rows
    scores = rows @ (target - iterate)
    # Weights are common to 1e-12 only, so a threshold is met to within that of the scale.
    rounding = (64 * EPS + WEIGHT_TOL) * length_scale(pool, query)
    near = set()
    if abs(np.sqrt(((target - iterate) ** 2).sum()) - options.get("tol", 1e-5)) <= rounding:
        near.add("CONVERGED")
    best = int(np.argmax(scores))
    if abs(np.sqrt(((rows[best] - iterate) ** 2).sum()) - 1e-6) <= rounding:
        near.add("STALLED")
    gained = after.dense(len(pool)) - weights
    new = sorted(set(after.indices) - set(before.indices))
    chosen = new[0] if new else int(np.argmax(gained)) if gained.max() > 0 else -1
    length = float(np.sqrt(((rows[chosen] - iterate) ** 2).sum()))
    margin = float(scores.max() - scores[chosen]) if chosen >= 0 else 0.0
    return _Step(
        after.dense(len(pool)), after.num_iters == at, near, chosen, margin, scores, length
    )


def _judge_step(pool: Array, query: Array, options: dict[str, Any], at: int, scale: float) -> None:
    """Fails unless the decisions at the common iterate `at` are within rounding of each other."""
    kernel, oracle = (_observe(run, pool, query, options, at) for run in _PROCEDURES)
    longest = float(np.linalg.norm(pool, axis=1).max())
    bound = 64 * EPS * longest * scale
    # Each took the best vertex of its own iterate, to within rounding ...
    assert kernel.margin <= bound, f"step {at}: kernel's vertex is {kernel.margin} short"
    assert oracle.margin <= bound, f"step {at}: oracle's vertex is {oracle.margin} short"
    if kernel.stopped != oracle.stopped:
        stopper, mover = (kernel, oracle) if kernel.stopped else (oracle, kernel)
        # ... stopped because a threshold was met to the last bits, or stood on the tied vertex.
        on_vertex = int(np.argmax(stopper.scores)) != mover.chosen
        assert stopper.near or on_vertex, f"step {at}: {stopper} stopped, {mover} moved"
        return
    if kernel.chosen == oracle.chosen:
        # ... moved by a step whose numerator is right to within rounding, over a small length ...
        error = np.abs(kernel.weights - oracle.weights).max()
        allowed = WEIGHT_TOL + (bound + 2 * WEIGHT_TOL * longest * scale) / kernel.length**2
        assert error <= allowed, f"step {at}: steps {error} apart"
        return
    # ... or the two vertices tie at both iterates.
    for step in (kernel, oracle):
        tie = abs(step.scores[kernel.chosen] - step.scores[oracle.chosen])
        assert tie <= bound + 2 * WEIGHT_TOL * longest * scale, f"step {at}: {tie} is no tie"


def reconstruction_loss(support: Array, query: Array, counts: Any, total: int) -> float:
    """L(c) = ||q - (c / N) S||^2 in extended precision."""
    shares = np.asarray(counts, dtype=np.longdouble) / total
    difference = query.astype(np.longdouble) - shares @ support.astype(np.longdouble)
    return float(difference @ difference)


def exchange_meets_a_tie(support: Array, query: Array, counts: Any, total: int) -> bool:
    """Whether an exchange pass from `counts` meets a move that gains 1e-14 to within rounding.

    Up to there every sound implementation makes the same moves; from there on rounding decides.
    """
    rounding = 1e-13 * length_scale(support, query) ** 2
    counts = np.array(counts)
    current = reconstruction_loss(support, query, counts, total)
    for i in np.flatnonzero(counts > 0):
        for j in np.flatnonzero(np.arange(len(counts)) != i):
            if counts[i] == 0:
                break
            counts[[i, j]] += [-1, 1]
            loss = reconstruction_loss(support, query, counts, total)
            if abs(current - loss - 1e-14) <= rounding:
                return True
            if current - loss > 1e-14:
                current = loss
            else:
                counts[[i, j]] += [1, -1]
    return False


def assert_counts(counts: Any, total: int) -> None:
    counts = np.asarray(counts)
    assert (counts >= 0).all(), f"negative counts: {counts}"
    assert (counts.sum(-1) == total).all(), f"sum {counts.sum(-1)} is not {total}"


def assert_simplex(weights: torch.Tensor) -> None:
    assert (weights >= 0).all()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(weights.shape[:-1], dtype=weights.dtype), rtol=0, atol=1e-12
    )


def gains_after(pool: Array, query: Array, order: Any, noise: float) -> Any:
    """What each row would take off the variance after `order`, in extended precision."""
    points = np.concatenate([pool, np.atleast_2d(query)]).astype(np.longdouble)
    kernel = points @ points.T
    for i in order:
        kernel = kernel - np.outer(kernel[:, i], kernel[:, i]) / (kernel[i, i] + noise)
    n = len(pool)
    return (kernel[n:, :n] ** 2).sum(0) / (kernel.diagonal()[:n] + noise)


def variance_after(pool: Array, query: Array, order: Array, noise: float) -> float:
    """The posterior variance in one go, from the kernel of all observations, repeats included."""
    rows, vectors = pool[order], np.atleast_2d(query)
    across = rows @ vectors.T
    observed = rows @ rows.T + noise * np.eye(len(rows))
    return float((vectors**2).sum() - (across * np.linalg.solve(observed, across)).sum())
