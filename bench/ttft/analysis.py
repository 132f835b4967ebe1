"""Means over queries with bootstrap intervals, and cells compared query by query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from bench.ttft.store import Row

RESAMPLES = 4000
ALL = "mean of subsets"


class Interval(NamedTuple):
    mean: float
    low: float  # 95 %, by bootstrap over queries
    high: float

    def text(self, sign: str = "", digits: int = 2) -> str:
        return f"{self.mean:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


class CellKey(NamedTuple):
    """What distinguishes the cells of one phase and model."""

    path: str
    rule: str
    budget: int
    lr: float
    betas: tuple[float, float]


Queries = dict[tuple[str, int], Row]  # by subset and number


def cells(rows: Iterable[Row], phase: str) -> dict[CellKey, Queries]:
    found: dict[CellKey, Queries] = defaultdict(dict)
    for row in rows:
        if row["phase"] == phase:
            betas = float(row["beta1"]), float(row["beta2"])
            cell = CellKey(row["path"], row["rule"], int(row["budget"]), float(row["lr"]), betas)
            found[cell][row["subset"], int(row["query"])] = row
    return dict(found)


def by_subset(values: dict[tuple[str, int], float]) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = defaultdict(list)
    for (subset, _), value in sorted(values.items()):
        found[subset].append(value)
    return {subset: np.array(of) for subset, of in found.items()}


def mean(values: dict[tuple[str, int], float]) -> Interval:
    """The mean of the subsets' means. Queries are drawn anew within each subset."""
    generator = np.random.default_rng(0)
    subsets = list(by_subset(values).values())
    drawn = np.zeros(RESAMPLES)
    for of in subsets:
        drawn += of[generator.integers(len(of), size=(RESAMPLES, len(of)))].mean(1)
    low, high = np.percentile(drawn / len(subsets), [2.5, 97.5])
    return Interval(float(np.mean([of.mean() for of in subsets])), float(low), float(high))


def column(queries: Queries, name: str) -> dict[tuple[str, int], float]:
    return {query: float(row[name]) for query, row in queries.items()}


def percent(queries: Queries) -> dict[tuple[str, int], float]:
    return column(queries, "percent")


def seconds(queries: Queries) -> dict[tuple[str, int], float]:
    """Of a whole query: retrieval, selection, adaptation and restoring."""
    parts = ("retrieve_ms", "select_ms", "adapt_ms", "restore_ms")
    return {q: sum(float(row[part]) for part in parts) / 1e3 for q, row in queries.items()}


def apart(
    one: dict[tuple[str, int], float], other: dict[tuple[str, int], float]
) -> dict[tuple[str, int], float]:
    """Differences of the queries that both have."""
    return {query: one[query] - other[query] for query in one.keys() & other.keys()}


def of_subset(values: dict[tuple[str, int], float], subset: str) -> dict[tuple[str, int], float]:
    """All of them for ALL."""
    return values if subset == ALL else {q: v for q, v in values.items() if q[0] == subset}


def calibrated(rows: Iterable[Row], path: str) -> dict[tuple[str, int], dict[float, float]]:
    """For each rule and budget, mean % of base by learning rate on the calibration queries."""
    found: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for cell, queries in cells(rows, "calibrate").items():
        if cell.path == path:
            found[cell.rule, cell.budget][cell.lr] = mean_only(percent(queries))
    return dict(found)


def mean_only(values: dict[tuple[str, int], float]) -> float:
    return float(np.mean([of.mean() for of in by_subset(values).values()]))


# Other precisions of the same weights take the rates of the one that was calibrated.
ALIKE = ("bf16", "float32", "bfloat16")


def best_rate(rows: list[Row], path: str, rule: str, budget: int) -> float:
    """The rate with the least mean BPB on the calibration queries, the lower one of a tie."""
    for calibrated_path in (path, *(ALIKE if path in ALIKE else ())):
        scores = calibrated(rows, calibrated_path).get((rule, budget))
        if scores:
            return min(sorted(scores), key=scores.__getitem__)
    raise LookupError(f"{path}, {rule}, {budget} passes: expected calibration rows, got none")


def interpolated(
    points: list[tuple[float, dict[tuple[str, int], float]]], wanted: float
) -> dict[tuple[str, int], float] | None:
    """Each query's value where the curve's mean cost is `wanted`: linear in the logarithm of the
    cost between the curve's points, None beyond them."""
    points = sorted(points, key=lambda point: point[0])
    costs = np.log([cost for cost, _ in points])
    if not costs[0] <= np.log(wanted) <= costs[-1]:
        return None
    weights = [np.interp(np.log(wanted), costs, unit) for unit in np.eye(len(points))]
    shared = set.intersection(*(set(values) for _, values in points))
    return {
        query: sum(w * values[query] for w, (_, values) in zip(weights, points, strict=True))
        for query in shared
    }


Curve = Callable[[float], dict[tuple[str, int], float] | None]
