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

Query = tuple[str, str]  # subset, number


class Point(NamedTuple):
    """A rule at one total, over the same queries in the same order as any other point."""

    total: int
    passes: np.ndarray  # [Q]
    share: np.ndarray  # [Q] BPB in % of the unadapted model's


Curves = dict[str, list[Point]]  # by rule, totals rising


def read(path: Path) -> dict[str, Curves]:
    """By subset, and pooled: of the queries that have all rules and totals; of rows measured twice
    the last."""
    points: dict[tuple[str, int], dict[Query, tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rule = f"{row['method']}, at most {row['cap']}" if row["cap"] else row["method"]
            share = 100 * float(row["bpb"]) / float(row["base_bpb"])
            of_rule = points.setdefault((rule, int(row["total"])), {})
            of_rule[row["subset"], row["query"]] = float(row["passes"]), share
    whole = sorted(set.intersection(*map(set, points.values())), key=lambda q: (q[0], int(q[1])))
    groups = {subset: [q for q in whole if q[0] == subset] for subset, _ in whole}
    if len(groups) > 1:
        groups[POOLED] = whole
    found: dict[str, Curves] = {}
    for group, queries in groups.items():
        for (rule, total), values in points.items():
            spent, shares = np.array([values[q] for q in queries]).T
            found.setdefault(group, {}).setdefault(rule, []).append(Point(total, spent, shares))
    return found


def at_passes(curve: list[Point], wanted: float) -> np.ndarray | None:
    """Each query's share where the curve's mean passes are `wanted`: linear between its totals,
    None beyond them."""
    means = [float(point.passes.mean()) for point in curve]
    for left, right, low, high in zip(curve, curve[1:], means, means[1:], strict=False):
        if low <= wanted <= high:
            part = (wanted - low) / (high - low) if high > low else 0.0
            return (1 - part) * left.share + part * right.share
    return None


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
    found = read(path)
    console = Console(width=150)
    for table in tables(found):
        console.print(table)
    draw(found, picture)
