# SPDX-License-Identifier: Apache-2.0
"""The tables of a run, and its summary for bench/results."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.ttft import analysis
from bench.ttft.analysis import ALL, CellKey, Measured, Values, of_subset
from bench.ttft.rules import PUBLISHED_BETAS
from bench.ttft.store import Row, write_parquet

INTERVALS = ("percent", "from_knn", "from_sift", "from_knn_at_seconds", "from_first_path")
# Bits per byte beside the published procedure's at the same settings, relative. With exact passes
# the difference is of rounding, and too small for percents.
PUBLISHED = "bpb_from_published"
ENDS = ("", "_low", "_high")
COSTS = ["seconds", *analysis.PHASES_OF_A_QUERY, "passes", "updates", "distinct", "tokens"]
COSTS += ["slots", "joules", "peak_mb"]
FIELDS = ["model", "phase", "path", "rule", "budget", "lr", "beta1", "beta2", "best", "subset"]
FIELDS += ["queries", "base_bpb"]
FIELDS += [f"{name}{end}" for name in (*INTERVALS, PUBLISHED) for end in ENDS]
FIELDS += [f"{name}{end}" for name in ("seconds", "joules") for end in ("_low", "_high")]
FIELDS += [*COSTS, "device", "threads", "torch", "commit", "command"]


class Judged:
    """The judged cells of one path, and which learning rate is each rule's best."""

    def __init__(self, rows: list[Row], path: str) -> None:
        found = analysis.cells(rows, "judge").items()
        self.cells = {cell: measured for cell, measured in found if cell.path == path}
        self.best = {
            cell: path == "published"
            or cell.lr == analysis.best_rate(rows, path, cell.rule, cell.budget, cell.betas)
            for cell in self.cells
        }

    def curve(self, rule: str) -> dict[int, Measured]:
        """By budget, at the rule's best rates."""
        return {
            cell.budget: measured
            for cell, measured in self.cells.items()
            if cell.rule == rule and self.best[cell] and cell.betas == PUBLISHED_BETAS
        }


def show(rows: list[Row]) -> None:
    console = Console(width=170)
    for phase in ("calibrate", "explore"):
        found = analysis.cells(rows, phase)
        if found:
            console.print(_rates(found, phase))
    lines = [line for line in summary(rows) if line["phase"] == "judge"]
    if lines:
        console.print(_judged(lines))


def _rates(found: dict[CellKey, Measured], phase: str) -> Table:
    table = Table("path", "rule", "passes", "lr", "betas", "queries", "% of base", title=phase)
    for cell, measured in found.items():
        table.add_row(
            cell.path,
            cell.rule,
            str(cell.budget),
            f"{cell.lr:g}",
            f"{cell.betas}",
            str(len(measured.rows)),
            analysis.interval(measured.percent).text(),
        )
    return table


def _judged(lines: Iterable[dict[str, Any]]) -> Table:
    columns = ("subset", "path", "passes", "rule", "lr", "best", "queries", "% of base")
    rivals = ("from kNN at equal passes", "from SIFT", "from kNN at equal seconds")
    table = Table(*columns, *rivals, "ms", "J", title="judged")
    for line in sorted(lines, key=lambda x: (x["subset"], x["path"], x["budget"])):
        cells = [_interval_text(line, name) for name in INTERVALS[:-1]]
        joules = line["joules"] if line["joules"] == "not available" else f"{line['joules']:.1f}"
        table.add_row(
            *(str(line[name]) for name in ("subset", "path", "budget", "rule", "lr", "best")),
            str(line["queries"]),
            *cells,
            f"{1e3 * line['seconds']:.0f}",
            joules,
        )
    return table


def _interval_text(line: dict[str, Any], name: str) -> str:
    if line[name] == "":
        return ""
    sign = "" if name == "percent" else "+"
    return analysis.Interval(line[name], line[f"{name}_low"], line[f"{name}_high"]).text(sign)


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """A line for each cell and subset, and for the mean of the subsets."""
    found: list[dict[str, Any]] = []
    for phase in ("calibrate", "explore"):
        for cell, measured in analysis.cells(rows, phase).items():
            found += _lines(phase, cell, measured, {"best": ""}, [None] * 4, None)
    paths = list(dict.fromkeys(row["path"] for row in rows if row["phase"] == "judge"))
    every = {path: Judged(rows, path) for path in paths}
    for judged in every.values():
        knn, sift = judged.curve("kNN"), judged.curve("SIFT")
        points = [(measured.seconds, measured.percent) for measured in knn.values()]
        for cell, measured in judged.cells.items():
            rivals = [curve.get(cell.budget) for curve in (knn, sift)]
            others = [None if r is None or r is measured else r.percent for r in rivals]
            own = cell.rule == "kNN" and judged.best[cell] and cell.betas == PUBLISHED_BETAS
            cost = analysis.mean(measured.seconds)
            others.append(None if own or not points else analysis.at_cost(points, cost))
            first = every[paths[0]].cells.get(cell._replace(path=paths[0]))
            others.append(None if first is None or first is measured else first.percent)
            best = {"best": "yes" if judged.best[cell] else "no"}
            found += _lines("judge", cell, measured, best, others, _published(every, cell))
    return found


def _published(every: dict[str, Judged], cell: CellKey) -> Measured | None:
    """The published procedure with a cell's settings, if it was judged with them."""
    if cell.path == "published" or "published" not in every:
        return None
    return every["published"].cells.get(cell._replace(path="published"))


def _lines(
    phase: str,
    cell: CellKey,
    measured: Measured,
    told: dict[str, Any],
    others: list[Values | None],
    published: Measured | None,
) -> list[dict[str, Any]]:
    first = next(iter(measured.rows.values()))
    beta1, beta2 = cell.betas
    head = {
        **{name: first[name] for name in ("model", "threads", "torch", "command")},
        # A run that was stopped may have gone on elsewhere, or with other code.
        **{
            name: " and ".join(sorted({row[name] for row in measured.rows.values()}))
            for name in ("device", "commit")
        },
        **{"phase": phase, "path": cell.path, "rule": cell.rule, "budget": cell.budget},
        **{"lr": cell.lr, "beta1": beta1, "beta2": beta2},
        **told,
    }
    subsets = list(analysis.by_subset(measured.percent))
    lines = []
    for subset in [*subsets, *([ALL] if len(subsets) > 1 else [])]:
        percent = of_subset(measured.percent, subset)
        rivals = [
            None if other is None else of_subset(analysis.apart(measured.percent, other), subset)
            for other in others
        ]
        line = head | {"subset": subset, "queries": len(percent)}
        line["base_bpb"] = analysis.mean(of_subset(measured.column("base_bpb"), subset))
        relative = None if published is None else of_subset(_relative(measured, published), subset)
        compared = zip((*INTERVALS, PUBLISHED), (percent, *rivals, relative), strict=True)
        for name, values in compared:
            triple = analysis.interval(values) if values else ("", "", "")
            line |= {f"{name}{end}": value for end, value in zip(ENDS, triple, strict=True)}
        line |= {name: _cost(measured, name, subset) for name in COSTS}
        _, *ends = analysis.interval(of_subset(measured.seconds, subset))
        line |= zip(("seconds_low", "seconds_high"), ends, strict=True)
        if line["joules"] != "not available":
            _, *ends = analysis.interval(of_subset(measured.column("joules"), subset))
            line |= zip(("joules_low", "joules_high"), ends, strict=True)
        lines.append(line)
    return lines


def _relative(one: Measured, other: Measured) -> Values:
    """Relative differences of bits per byte, of the queries that both have."""
    mine, theirs = one.column("bpb"), other.column("bpb")
    return {query: mine[query] / theirs[query] - 1.0 for query in mine.keys() & theirs.keys()}


def _cost(measured: Measured, name: str, subset: str) -> float | str:
    if name == "seconds":
        return analysis.mean(of_subset(measured.seconds, subset))
    if any(row[name] == "not available" for row in measured.rows.values()):
        return "not available"
    values = of_subset(measured.column(name), subset)
    return max(values.values()) if name == "peak_mb" else analysis.mean(values)


def write_summary(rows: list[Row], path: Path) -> None:
    """The CSV, and beside it all rows as parquet if pyarrow is installed."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for line in summary(rows):
            writer.writerow({k: _short(v) for k, v in line.items()})
    if not write_parquet(rows, path.with_suffix(".parquet")):
        print("pyarrow is not installed: no parquet")


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
