# SPDX-License-Identifier: Apache-2.0
"""The selections of one query."""

from __future__ import annotations

from typing import Any

import numpy as np

from .fill import integerize_by_geometry, pad_by_weights_deterministic
from .selector import KNNSelector, SIFTSelector, get_selector


def run_selection(
    pool: Any, query: Any, n_select: int, fill: str | None, **options: Any
) -> tuple[Any, Any]:
    """Rows of the pool to finetune on, one for each update, heaviest first."""
    indices, weights = get_selector("fw", **options).select(pool, query, n_select)
    if fill == "integerization":
        support = pool.astype("float64")[indices]
        target = query.astype("float64").reshape(-1, query.shape[-1]).mean(axis=0)
        indices, weights = integerize_by_geometry(
            indices, weights, support, target, n_select, swap_passes=2
        )
    elif fill == "pad_by_weights":
        indices, weights = pad_by_weights_deterministic(indices, weights, n_select)
    order = np.argsort(-weights, kind="stable")
    return indices[order], weights[order]


def run_baselines(pool: Any, query: Any, n_select: int) -> dict[str, tuple[Any, Any]]:
    """What the hull is compared with, by name."""
    return {
        selector.name: selector().select(pool, query, n_select)
        for selector in (KNNSelector, SIFTSelector)
    }
