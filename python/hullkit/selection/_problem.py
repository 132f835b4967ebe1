# SPDX-License-Identifier: Apache-2.0
"""The pool, the query and their candidates, checked once and handed down."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import (
    as_readable,
    check_floating,
    check_integers,
    check_like,
    check_tensor,
    has_values,
    is_readable,
)


class Problem(NamedTuple):
    """Checked inputs of a selection, as the operators take them: batched or not."""

    pool: Tensor  # [n, d] or [B, n, d], unit stride along d
    query: Tensor  # [d] or [B, d] or, where several are allowed, [B, m, d]; unit stride along d
    lengths: Tensor | None  # [] or [B] int64
    candidates: Tensor | None  # [n] or [B, n] int64

    # No property: the compiler of torch 2.6 cannot look into one of a NamedTuple.
    def positions(self) -> int:
        """n, the number of candidate positions of each query."""
        return self.pool.shape[-2] if self.candidates is None else self.candidates.shape[-1]

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised output, `shape` behind the batch dimension if there is one."""
        if self.query.ndim > 1:
            shape = (self.query.shape[0], *shape)
        # Single sizes: reading a tuple takes torch half as long again, a torch.Size twice as long.
        return self.query.new_empty(*(shape or ((),)), dtype=dtype)


def check_pool_query(
    pool: Any,
    query: Any,
    lengths: Any = None,
    candidates: Any = None,
    *,
    query_name: str = "query",
    several: bool = False,
) -> Problem:
    """Checks the inputs that every selection shares.

    pool (n, d) with query (d,): one problem. pool (n, d) with query (B, d): one pool for all.
    pool (B, n, d) with query (B, d): a pool each. candidates needs a shared pool.
    several: query (B, m, d) is a batch of prompts of m vectors each.
    """
    pool = check_floating("pool", pool)
    query = check_floating(query_name, query)
    if query.dtype != pool.dtype:
        raise TypeError(f"{query_name}: expected the pool's dtype {pool.dtype}, got {query.dtype}")
    check_like(query_name, query, pool)
    rows, row = pool.shape, query.shape  # read once: every look at a tensor takes time
    if len(rows) not in (2, 3):
        raise ValueError(f"pool: expected shape (n, d) or (B, n, d), got {tuple(rows)}")
    if len(row) not in (1, 2) and not (several and len(row) == 3 and row[1] > 0):
        shapes = "(d,), (B, d) or (B, m, d) with m >= 1" if several else "(d,) or (B, d)"
        raise ValueError(f"{query_name}: expected shape {shapes}, got {tuple(row)}")
    if len(rows) == 3 and (len(row) == 1 or row[0] != rows[0]):
        raise ValueError(
            f"{query_name}: expected shape ({rows[0]}, {rows[2]}) for a pool of shape "
            f"{tuple(rows)}, got {tuple(row)}"
        )
    if row[-1] != rows[-1]:
        raise ValueError(
            f"{query_name}: expected d = {rows[-1]} coordinates as in the pool, got {row[-1]}"
        )
    if rows[-1] == 0 or rows[-2] == 0:
        raise ValueError(
            f"pool: expected at least one row and one coordinate, got shape {tuple(rows)}"
        )
    if lengths is None and candidates is None:
        return Problem(as_readable(pool), as_readable(query), None, None)
    leading = tuple(row[: min(len(row) - 1, 1)])  # () or (B,)
    if candidates is not None:
        candidates = check_tensor("candidates", candidates)
        if len(rows) != 2:
            raise ValueError(
                "candidates: expected a shared pool of shape (M, d), "
                f"got a pool of shape {tuple(rows)}"
            )
        if candidates.ndim != len(leading) + 1 or candidates.shape[-1] == 0:
            batch = "".join(f"{size}, " for size in leading)
            raise ValueError(
                f"candidates: expected shape ({batch}n) with n >= 1, got {tuple(candidates.shape)}"
            )
        candidates = check_integers(
            "candidates", candidates, (*leading, candidates.shape[-1]), pool, rows[0] - 1
        )
    if lengths is not None:
        positions = rows[-2] if candidates is None else candidates.shape[-1]
        lengths = check_integers("lengths", lengths, leading, pool, positions)
    if candidates is not None and not is_readable(pool) and candidates.numel() < rows[0]:
        pool, candidates = _candidates_alone(pool, candidates, lengths)
    return Problem(as_readable(pool), as_readable(query), lengths, candidates)


def _candidates_alone(
    pool: Tensor, candidates: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A pool of the candidates' rows, and their places in it: a pool that lies by columns has to be
    copied, and may be much larger. What is no row stays none, and what is out of range remains so.
    """
    if candidates.numel() == 0:
        return pool[:1], candidates  # nobody reads it
    if lengths is not None:  # anything may stand beyond them
        places = torch.arange(candidates.shape[-1], device=pool.device)
        candidates = candidates.masked_fill(places >= lengths[..., None], -1)
    beyond = (candidates < -1) | (candidates >= len(pool))
    if has_values(beyond) and bool(beyond.any()):
        return pool, candidates  # the error says how many rows the pool has
    rows = candidates.flatten()
    places = torch.arange(len(rows), device=pool.device).view(candidates.shape)
    places = torch.where(beyond | (candidates < 0), candidates, places)
    return pool[rows.clamp(0, len(pool) - 1)], places
