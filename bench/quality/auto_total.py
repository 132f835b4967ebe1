# SPDX-License-Identifier: Apache-2.0
"""How select(total="auto") was calibrated, and what it is worth against one total for all prompts.

Of the rows in bench/results/selection_quality.csv: for each alpha, every query gets the scores of
the total that `select` chooses from its embeddings. The rows of "hull, one run" are those multisets
exactly (the numbers of distinct examples are compared); SIFT stops between totals, where scores are
interpolated. `of fixed` is against a single total with the same mean passes, interpolated between
totals too, in points of BPB %: minus is better.
"""

from __future__ import annotations

from pathlib import Path

import hullkit
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.harness import texts
from bench.quality import report as quality_report
from bench.quality.report import Point, Query, Rows, rule_name

CALIBRATED_ON = ("python", "kernel_docs"), 10  # subsets, and their first queries
KEPT = 0.9  # of what the largest total gains: by each of RULES
ALPHAS = [round(0.01 * step, 2) for step in range(4, 16)]
RULES = [("hull", None), ("hull", 2), ("sift", 2)]


def chosen_totals(
    folder: Path, queries: list[Query], method: str, cap: int | None, alpha: float, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    """[Q] totals and distinct examples of select(total="auto")."""
    totals, distinct = np.zeros(len(queries), int), np.zeros(len(queries), int)
    for subset in {subset for subset, _ in queries}:
        at = [i for i, query in enumerate(queries) if query[0] == subset]
        data = texts.embeddings(folder, subset).float()
        numbers = [queries[i][1] for i in at]
        chosen = hullkit.select(
            data.pool, data.query[numbers], "auto", method=method, alpha=alpha,
            max_total=largest, max_multiplicity=cap, candidates=data.candidates[numbers],
        )  # fmt: skip
        totals[at], distinct[at] = chosen.total, (chosen.counts > 0).sum(1)
    return totals, distinct


def scores(curve: list[Point], totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[Q] passes and shares at each query's own total."""
    grid = [point.total for point in curve]
    return tuple(  # type: ignore[return-value]
        np.array([np.interp(t, grid, of_query) for t, of_query in zip(totals, values, strict=True)])
        for values in (
            np.stack([point.passes for point in curve], 1),
            np.stack([point.share for point in curve], 1),
        )
    )


def calibrate(path: Path, folder: Path) -> None:
    rows = Rows(path)
    subsets, first = CALIBRATED_ON
    groups = {
        "calibration": [q for q in rows.queries if q[0] in subsets and q[1] < first],
        "held-out queries": [q for q in rows.queries if q[0] in subsets and q[1] >= first],
    }
    groups |= {s: [q for q in rows.queries if q[0] == s] for s in rows.subsets if s not in subsets}
    groups = {name: queries for name, queries in groups.items() if queries}
    console = Console(width=150)
    met = dict.fromkeys(ALPHAS, True)
    for method, cap in RULES:
        measured = quality_report.ONE_RUN if method == "hull" else method
        table = Table("alpha", title=f"{rule_name(method, cap)}: passes, gain kept, of fixed")
        for name, queries in groups.items():
            table.add_column(f"{name}, {len(queries)} queries")
        for alpha in ALPHAS:
            cells = []
            for name, queries in groups.items():
                curve = rows.curves(queries)[rule_name(measured, cap)]
                last = curve[-1]
                totals, distinct = chosen_totals(folder, queries, method, cap, alpha, last.total)
                passes, shares = scores(curve, totals)
                if method == "hull":
                    at = {point.total: point.distinct for point in curve}
                    assert all(at[t][i] == distinct[i] for i, t in enumerate(totals))
                kept = (100 - shares.mean()) / (100 - last.share.mean())
                fixed = quality_report.at_passes(curve, float(passes.mean()))
                assert fixed is not None
                spent = passes.mean() / last.passes.mean()
                apart = quality_report.mean(shares - fixed, 2, "+")
                cells.append(f"{passes.mean():.1f} ({spent:.0%}), {kept:.0%}, {apart}")
                if name == "calibration" and method == "hull":
                    met[alpha] &= bool(kept >= KEPT)
            table.add_row(f"{alpha:.2f}", *cells)
        console.print(table)
    best = max(alpha for alpha in ALPHAS if met[alpha])
    console.print(f"the largest alpha with {KEPT:.0%} of the gain, hull and capped hull: {best}")
