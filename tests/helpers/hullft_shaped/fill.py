# SPDX-License-Identifier: Apache-2.0
"""A support and its weights, filled up to n_select indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from hullkit import reference


def integerize_by_geometry(
    indices: Any,
    weights: Any,
    support_embeddings: Any,
    target: Any,
    n_select: int,
    swap_passes: int = 2,
) -> Any:
    counts = reference.round_multiplicities(
        np.float64(support_embeddings), np.float64(target), weights, n_select, swap_passes
    )
    expanded = [index for index, count in zip(indices, counts, strict=True) for _ in range(count)]
    return np.array(expanded), np.full(n_select, 1 / n_select)


def pad_by_weights_deterministic(indices: Any, weights: Any, n_select: int) -> Any:
    if len(indices) >= n_select:
        return indices[:n_select].copy(), weights[:n_select].copy()
    weights = weights / weights.sum()
    counts = reference.apportion(weights, n_select)
    return np.repeat(indices, counts), np.repeat(weights, counts)
