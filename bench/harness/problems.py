# SPDX-License-Identifier: Apache-2.0
"""Selection problems that benchmarks run on: made from a seed, unit length, float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Selection(NamedTuple):
    pool: Array  # [B, n, d]
    query: Array  # [B, d]


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def gaussian(batch: int, n: int, d: int, seed: int = 0) -> Selection:
    """Directions without structure: the largest supports, so the most work for the kernels."""
    rng = np.random.default_rng(seed)
    return Selection(_unit(rng.normal(size=(batch, n, d))), _unit(rng.normal(size=(batch, d))))


def neighbours(batch: int, n: int, d: int, seed: int = 0) -> Selection:
    """Nearest neighbours of a query, nearest first: a common direction, topics, own noise.

    Similarities: query to pool 0.53 to 0.79, 0.62 on average within a pool, as of real text.
    """
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(batch, 24, d))
    common = rng.normal(size=(batch, 1, d))
    member = rng.integers(24, size=(batch, n))
    noise = rng.normal(size=(batch, n, d))
    pool = _unit(common + 0.55 * np.take_along_axis(topics, member[..., None], 1) + 0.6 * noise)
    query = _unit(common[:, 0] + 0.55 * topics[:, 0] + 0.6 * rng.normal(size=(batch, d)))
    nearest_first = np.argsort(-np.einsum("bnd,bd->bn", pool, query), axis=1)
    return Selection(np.take_along_axis(pool, nearest_first[..., None], 1), query)


KINDS = {"gaussian": gaussian, "neighbours": neighbours}
