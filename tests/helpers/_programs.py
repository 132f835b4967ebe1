# SPDX-License-Identifier: Apache-2.0
"""Quadratic programs by scipy, independent of every Frank-Wolfe: what the variants must reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]


def scale_squared(pool: Array, query: Array) -> float:
    return float(max((pool**2).sum(1).max(), query @ query))


def hull_optimum(pool: Array, query: Array) -> float:
    """min 1/2 ||query - w @ pool||^2 over the simplex, by non-negative least squares.

    With D = pool - query, the minimum of ||u @ D||^2 + (sum u - 1)^2 over u >= 0 is at a multiple
    of the w that minimises ||w @ D|| (Haskell and Hanson 1981).
    """
    differences = np.vstack([(pool - query).T, np.ones(len(pool))])
    ones = np.zeros(len(differences))
    ones[-1] = 1.0
    multiple, _ = nnls(differences, ones, maxiter=100 * len(pool))
    residual = query - multiple / multiple.sum() @ pool
    return float(residual @ residual) / 2


def capped_optimum(pool: Array, query: Array, max_weight: float) -> float:
    """min 1/2 ||query - w @ pool||^2 over {0 <= w_i <= max_weight, sum w = 1}, to about 1e-10.

    Non-negative least squares in w and max_weight - w, with the constraints as heavy rows; its w
    made feasible, so never below the minimum.
    """
    (n, d), heavy, scale = pool.shape, 1e5, np.sqrt(scale_squared(pool, query))
    system = np.zeros((d + n + 1, 2 * n))
    system[:d, :n] = pool.T / scale
    system[d:-1] = heavy * np.hstack([np.eye(n), np.eye(n)])
    system[-1, :n] = heavy
    target = np.concatenate([query / scale, np.full(n, heavy * max_weight), [heavy]])
    weights = np.minimum(nnls(system, target, maxiter=200 * n)[0][:n], max_weight)
    room = max_weight - weights if weights.sum() < 1 else weights
    if room.any():
        weights = weights + (1 - weights.sum()) * room / room.sum()
    residual = query - weights @ pool
    return float(residual @ residual) / 2
