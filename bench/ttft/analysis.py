# SPDX-License-Identifier: Apache-2.0
"""Means over queries with bootstrap intervals, and cells compared query by query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bench.ttft.rules import PUBLISHED_BETAS
from bench.ttft.store import Row

RESAMPLES = 4000
ALL = "mean of subsets"
# A path that was not calibrated takes the rates of another one that trains the same weights.
ALIKE = (("bf16", "float32", "bfloat16"), ("lora", "many"))
PHASES_OF_A_QUERY = ("retrieve_ms", "select_ms", "adapt_ms", "restore_ms")

Values = dict[tuple[str, int], float]  # by subset and query


class Interval(NamedTuple):
    mean: float
    low: float  # 95 %, by bootstrap over queries
    high: float

    def text(self, sign: str = "", digits: int = 2) -> str:
        mean, low, high = (f"{value:{sign}.{digits}f}" for value in self)
        return f"{mean} [{low}, {high}]"


class CellKey(NamedTuple):
    """What distinguishes the cells of one phase and model."""

    path: str
    rule: str
    budget: int
    lr: float
    betas: tuple[float, float]


class Measured:
    """The rows of one cell, by subset and query."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], Row] = {}

    def column(self, name: str) -> Values:
        return {query: float(row[name]) for query, row in self.rows.items()}

    @property
    def percent(self) -> Values:
        return self.column("percent")

    @property
    def seconds(self) -> Values:
        """Of a whole query; scoring is not in it."""
        columns = [self.column(name) for name in PHASES_OF_A_QUERY]
        return {query: sum(column[query] for column in columns) / 1e3 for query in self.rows}


def cells(rows: Iterable[Row], phase: str) -> dict[CellKey, Measured]:
    found: dict[CellKey, Measured] = defaultdict(Measured)
    for row in rows:
        if row["phase"] == phase:
            betas = float(row["beta1"]), float(row["beta2"])
            cell = CellKey(row["path"], row["rule"], int(row["budget"]), float(row["lr"]), betas)
            found[cell].rows[row["subset"], int(row["query"])] = row
    return dict(sorted(found.items()))


def by_subset(values: Values) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = defaultdict(list)
    for (subset, _), value in sorted(values.items()):
        found[subset].append(value)
    return {subset: np.array(of) for subset, of in found.items()}


def mean(values: Values) -> float:
    """The mean of the subsets' means."""
    return float(np.mean([of.mean() for of in by_subset(values).values()]))


def interval(values: Values) -> Interval:
    """`mean`, with queries drawn anew within each subset."""
    generator = np.random.default_rng(0)
    drawn = np.zeros(RESAMPLES)
    subsets = by_subset(values).values()
    for of in subsets:
        drawn += of[generator.integers(len(of), size=(RESAMPLES, len(of)))].mean(1)
    low, high = np.percentile(drawn / len(subsets), [2.5, 97.5])
    return Interval(mean(values), float(low), float(high))


def apart(one: Values, other: Values) -> Values:
    """Differences of the queries that both have."""
    return {query: one[query] - other[query] for query in one.keys() & other.keys()}


def of_subset(values: Values, subset: str) -> Values:
    return values if subset == ALL else {q: v for q, v in values.items() if q[0] == subset}


def tried(rows: Iterable[Row]) -> dict[CellKey, float]:
    """The mean of each cell on the calibration queries."""
    kept = list(rows)
    found = cells(kept, "explore") | cells(kept, "calibrate")
    return {cell: mean(measured.percent) for cell, measured in found.items()}


def best_rate(
    rows: Iterable[Row],
    path: str,
    rule: str,
    budget: int,
    betas: tuple[float, float] = PUBLISHED_BETAS,
) -> float:
    """The rate with the least mean BPB on the calibration queries, the lower one of a tie."""
    wanted = (rule, budget, betas)
    scores = {
        cell: score
        for cell, score in tried(rows).items()
        if (cell.rule, cell.budget, cell.betas) == wanted
    }
    for source in (path, *(other for paths in ALIKE if path in paths for other in paths)):
        own = {cell.lr: score for cell, score in scores.items() if cell.path == source}
        if own:
            return min(sorted(own), key=own.__getitem__)
    raise LookupError(f"{path}, {rule}, {budget} passes: expected calibration rows, got none")


def best_idea(rows: list[Row], path: str) -> tuple[str, int, float, tuple[float, float]] | None:
    """The explored cell with the least mean BPB; None if nothing was explored."""
    explored = [cell for cell in cells(rows, "explore") if cell.path == path]
    if not explored:
        return None
    scores = tried(rows)
    best = min(explored, key=scores.__getitem__)
    return best.rule, best.budget, best.lr, best.betas


def at_cost(points: list[tuple[Values, Values]], wanted: float) -> Values | None:
    """Each query's value where a curve's mean cost is `wanted`.

    points: (costs, values) of the curve. It is linear in the logarithm of the cost between them,
    and flat for a tenth beyond its ends; None further out.
    """
    points = sorted(points, key=lambda point: mean(point[0]))
    costs = np.log([mean(cost) for cost, _ in points])
    log = np.log(wanted)
    if not costs[0] - 0.1 <= log <= costs[-1] + 0.1:
        return None
    weights = [float(np.interp(log, costs, unit)) for unit in np.eye(len(points))]
    shared = set.intersection(*(set(values) for _, values in points))
    return {
        query: sum(w * values[query] for w, (_, values) in zip(weights, points, strict=True))
        for query in shared
    }
