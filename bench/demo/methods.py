# SPDX-License-Identifier: Apache-2.0
"""The methods that the demo compares, and how one of them is measured on one query.

A method is a choice of examples with counts, and a number of updates per gradient. Everything timed
is a public call of hullkit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import hullkit
import torch
from language_model import LanguageModel, Tokens
from torch import Tensor

BASE = "base"
KNN = "kNN"
KNN_TWICE = "kNN, two updates a gradient"
HULL_PLAIN = "hull without reuse"
HULL = "hull with reuse"
KNN_SAME_PASSES = "kNN, passes of hull with reuse"
KNN_TWICE_SAME_PASSES = "kNN x 2, passes of hull with reuse"


class Plan(NamedTuple):
    """What to finetune on: pool rows in visiting order, updates for each, updates per gradient."""

    method: str
    rows: list[int]
    counts: list[int]
    refresh_interval: int
    select_seconds: float

    @property
    def passes(self) -> int:
        """Forward-backward passes."""
        return len(hullkit.reuse_schedule(self.counts, self.refresh_interval))


class Outcome(NamedTuple):
    """One method on one query."""

    method: str
    distinct: int
    updates: int
    passes: int
    select_seconds: float
    finetune_seconds: float
    bpb: float

    @property
    def seconds(self) -> float:
        """Selection and finetuning together."""
        return self.select_seconds + self.finetune_seconds


def plans(
    pool: Tensor, query: Tensor, candidates: Tensor, updates: int, refresh_interval: int
) -> list[Plan]:
    """All methods' plans for one query. pool [M, d], query [d], candidates [n] rows of the pool."""

    def select(method: str, total: int) -> tuple[list[int], list[int], float]:
        began = time.perf_counter()
        chosen = hullkit.select(pool, query, total, method=method, candidates=candidates)
        seconds = time.perf_counter() - began
        pairs = zip(chosen.rows.tolist(), chosen.counts.tolist(), strict=True)
        kept = [(row, count) for row, count in pairs if count > 0]
        return [row for row, _ in kept], [count for _, count in kept], seconds

    def knn(name: str, total: int) -> Plan:
        rows, counts, seconds = select("knn", total)
        return Plan(name, rows, counts, 1, seconds)

    def knn_twice(name: str, total: int) -> Plan:
        rows, counts, seconds = select("knn", math.ceil(total / 2))
        counts = [2] * (total // 2) + [1] * (total % 2)
        return Plan(name, rows, counts, 2, seconds)

    rows, counts, seconds = select("hull", updates)
    hull = Plan(HULL, rows, counts, refresh_interval, seconds)
    return [
        knn(KNN, updates),
        knn_twice(KNN_TWICE, updates),
        Plan(HULL_PLAIN, rows, counts, 1, seconds),
        hull,
        knn(KNN_SAME_PASSES, hull.passes),
        knn_twice(KNN_TWICE_SAME_PASSES, min(2 * hull.passes, 2 * len(candidates))),
    ]


def measure(
    language_model: LanguageModel,
    plan: Plan,
    query: Tokens,
    tokens_of: Callable[[int], Tensor],
    lr: float,
) -> Outcome:
    """Adapt to the plan, score the query, put the base weights back.

    The query's text is only scored. Finetuning seconds: entering and leaving the block, that is,
    saving, passes, updates and restoring, but not the score.
    """
    model = language_model.model
    tuner = hullkit.TestTimeFinetuner(model, lr=lr, refresh_interval=plan.refresh_interval)
    examples = [tokens_of(row) for row in plan.rows]
    synchronize(model.device)
    entered = time.perf_counter()
    with tuner.adapted(examples, plan.counts) as adapted:
        synchronize(model.device)
        began = time.perf_counter()
        bpb = hullkit.bits_per_byte(adapted, query.ids, query.scored_bytes)
        scored = time.perf_counter()
    synchronize(model.device)
    seconds = time.perf_counter() - entered - (scored - began)
    total = sum(plan.counts)
    return Outcome(
        plan.method, len(plan.rows), total, plan.passes, plan.select_seconds, seconds, bpb
    )


def base(language_model: LanguageModel, query: Tokens) -> Outcome:
    """The model as it is."""
    bpb = hullkit.bits_per_byte(language_model.model, query.ids, query.scored_bytes)
    return Outcome(BASE, 0, 0, 0, 0.0, 0.0, bpb)


def synchronize(device: torch.device) -> None:
    """Wait for the device: a host clock says nothing about launches still under way."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
