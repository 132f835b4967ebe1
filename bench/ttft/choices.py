# SPDX-License-Identifier: Apache-2.0
"""What a rule trains on for each query, at a budget of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import hullkit
import torch
from torch import Tensor

from bench.harness.texts import Embeddings
from bench.ttft.rules import Rule


class Choice(NamedTuple):
    """Rows of the documents in visiting order, a list for each pass's sequence, and its updates."""

    total: int  # as `select` was asked
    groups: list[list[int]]
    counts: list[int]


def passes(counts: Tensor, interval: int) -> Tensor:
    """[..., S] counts to [...] passes."""
    return ((counts + interval - 1) // interval).sum(-1)


def totals(rule: Rule, budget: int, data: Embeddings) -> list[int]:
    """For each query the largest total whose counts take the budget's passes, or the most below."""
    tried = range(budget, budget * rule.refresh_interval + 1)
    if rule.refresh_interval == 1:
        return [budget] * len(data.query)
    if rule.method == "knn":
        assert rule.cap == rule.refresh_interval
        return [tried[-1]] * len(data.query)
    spent = torch.stack(
        [passes(selected(rule, data, total).counts, rule.refresh_interval) for total in tried]
    )  # [T, Q]
    spent = torch.where(spent <= budget, spent, 0)
    last_best = len(tried) - 1 - spent.flip(0).argmax(0)
    return [tried[i] for i in last_best.tolist()]


def selected(
    rule: Rule, data: Embeddings, total: int, backend: str | None = None
) -> hullkit.Multiset:
    return hullkit.select(
        data.pool,
        data.query * rule.stretch,
        total,
        candidates=data.candidates,
        backend=backend,
        **rule.options(),
    )


def choose(
    rule: Rule,
    data: Embeddings,
    total: int,
    budget: int,
    lengths: Callable[[int], int],
    backend: str | None = None,
) -> Choice:
    """For one query, its embedding unbatched. lengths: tokens of a document."""
    if rule.join:
        return _joined(rule, data, budget, lengths, backend)
    chosen = selected(rule, data, total, backend)
    if rule.order == "chosen":
        order = data.candidates[chosen.result.order].tolist()
        return Choice(total, [[row] for row in order], [1] * len(order))
    counts = chosen.counts
    kept = (counts > 0).nonzero().flatten()
    if rule.order == "reversed":
        kept = kept.flip(0)
    elif rule.order == "nearest":
        kept = kept[(data.pool[chosen.rows[kept]] @ data.query).argsort(descending=True)]
    rows = chosen.rows[kept].tolist()
    return Choice(total, [[row] for row in rows], counts[kept].tolist())


def _joined(
    rule: Rule,
    data: Embeddings,
    budget: int,
    lengths: Callable[[int], int],
    backend: str | None,
) -> Choice:
    """Sequences of several documents: as many documents as `budget` sequences hold."""
    rows = selected(rule, data, len(data.candidates), backend).rows.tolist()
    groups: list[list[int]] = []
    used = 0
    for row in rows:
        used += lengths(row)
        if groups and used <= rule.join:
            groups[-1].append(row)
        elif len(groups) == budget:
            break
        else:
            groups.append([row])
            used = lengths(row)
    return Choice(sum(map(len, groups)), groups, [1] * len(groups))
