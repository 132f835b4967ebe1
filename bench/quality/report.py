# SPDX-License-Identifier: Apache-2.0
"""Tables and the picture of bench/results/selection_quality.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

FIELDS = ["subset", "query", "method", "cap", "total", "passes", "distinct", "hull_residual"]
FIELDS += ["dual_gap", "residual", "variance", "base_bpb", "bpb"]
FIELDS += ["device", "torch", "commit", "command"]
ONE_RUN = "hull, one run"
POOLED = "all"

Query = tuple[str, int]  # subset, number
Scores = dict[Query, tuple[float, float, float]]  # passes, BPB in % of unadapted, distinct examples


class Point(NamedTuple):
    """A rule at one total, over the same queries in the same order as any other point."""

    total: int
    passes: np.ndarray  # [Q]
    share: np.ndarray  # [Q] BPB in % of the unadapted model's
    distinct: np.ndarray  # [Q]


Curves = dict[str, list[Point]]  # by rule, totals rising


def rule_name(method: str, cap: int | str | None) -> str:
    return f"{method}, at most {cap}" if cap else method


class Rows:
    """The CSV: the queries that have all rules and totals; of what was measured twice the last."""

    def __init__(self, path: Path) -> None:
        self._scores: dict[tuple[str, int], Scores] = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                rule = rule_name(row["method"], row["cap"])
                share = 100 * float(row["bpb"]) / float(row["base_bpb"])
                scores = self._scores.setdefault((rule, int(row["total"])), {})
                query = row["subset"], int(row["query"])
                scores[query] = float(row["passes"]), share, float(row["distinct"])
        self.queries = sorted(set.intersection(*map(set, self._scores.values())))
        self.subsets = list(dict.fromkeys(subset for subset, _ in self.queries))

    def curves(self, queries: list[Query]) -> Curves:
        found: Curves = {}
        for (rule, total), scores in sorted(self._scores.items(), key=lambda item: item[0][1]):
            columns = np.array([scores[query] for query in queries]).T
            found.setdefault(rule, []).append(Point(total, *columns))
        return found

    def groups(self) -> dict[str, Curves]:
        """By subset, and pooled."""
        found = {s: self.curves([q for q in self.queries if q[0] == s]) for s in self.subsets}
        return found | ({POOLED: self.curves(self.queries)} if len(found) > 1 else {})


def at_passes(curve: list[Point], wanted: float) -> np.ndarray | None:
    """Each query's share where the curve's mean passes are `wanted`: linear between its totals,
    the end's up to half a pass beyond it, and None further out."""
    means = [float(point.passes.mean()) for point in curve]
    nearest = min(max(wanted, means[0]), means[-1])
    if abs(wanted - nearest) > 0.5:
        return None
    shares: np.ndarray = np.stack([point.share for point in curve])
    weights = np.array([np.interp(nearest, means, unit) for unit in np.eye(len(means))])
    return weights @ shares


def mean(values: np.ndarray, digits: int = 2, sign: str = "") -> str:
    """With its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{values.mean():{sign}.{digits}f} ± {error:.{digits}f}"


def tables(found: dict[str, Curves]) -> list[Table]:
    shares = Table(title="BPB in % of the unadapted model (passes): means over the queries")
    apart = Table(title="points of BPB % from the plain hull at the same passes (minus is better)")
    totals = sorted({point.total for curve in found[next(iter(found))].values() for point in curve})
    for table in (shares, apart):
        for column in ("subset", "queries", "rule", *map(str, totals)):
            table.add_column(column)
    for group, curves in found.items():
        for rule, curve in curves.items():
            lead = (group, str(len(curve[0].share)), rule)
            at = {p.total: p for p in curve}
            shares.add_row(
                *lead,
                *(
                    f"{at[t].share.mean():.2f} ({at[t].passes.mean():.1f})" if t in at else ""
                    for t in totals
                ),
            )
            if rule == "hull":
                continue
            cells = []
            for total in totals:
                point = at.get(total)
                plain = None
                if point is not None:
                    plain = at_passes(curves["hull"], float(point.passes.mean()))
                cells.append("" if plain is None else mean(point.share - plain, 2, "+"))
            apart.add_row(*lead, *cells)
        shares.add_section()
        apart.add_section()
    return [shares, apart]


def draw(found: dict[str, Curves], path: Path) -> None:
    """BPB over passes, a panel for each subset and a curve for each rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.6), squeeze=False)
    for axis, (group, curves) in zip(axes[0], found.items(), strict=True):
        for (rule, curve), marker in zip(curves.items(), "sov^DPX*p", strict=False):
            if rule.startswith(ONE_RUN):
                continue
            spent = [p.passes.mean() for p in curve]
            shares = [p.share.mean() for p in curve]
            dashes = "--" if "at most" in rule else "-"
            axis.plot(spent, shares, dashes, marker=marker, ms=5, alpha=0.7, label=rule)
        axis.set_title(f"{group}, {len(curve[0].share)} queries", fontsize=10)
        axis.set_xlabel("passes")
    axes[0][0].set_ylabel("BPB, % of unadapted")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def show(path: Path, picture: Path) -> None:
    found = Rows(path).groups()
    console = Console(width=150)
    for table in tables(found):
        console.print(table)
    draw(found, picture)
