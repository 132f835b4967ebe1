# SPDX-License-Identifier: Apache-2.0
"""The demo's table and what it says in words."""

from __future__ import annotations

from collections.abc import Sequence

import methods
import numpy as np
from methods import Outcome
from rich.table import Table

COLUMNS = ("method", "distinct\nexamples", "updates", "passes", "selection\nms", "finetuning\ns")
COLUMNS += ("BPB", "% of base\n± s.e.")

UNSTEADY = 1.5  # seconds per pass, slowest method to fastest: beyond this it is not the methods


def mean_of(outcomes: Sequence[Outcome]) -> Outcome:
    """One method's mean over the queries."""
    numbers = np.mean([outcome[1:] for outcome in outcomes], axis=0)
    return Outcome(outcomes[0].method, *map(float, numbers))


def shares_of_base(outcomes: Sequence[Sequence[Outcome]]) -> np.ndarray:
    """BPB in percent of the unadapted model's. [queries, methods], in the order of `outcomes`."""
    bpb = np.array([[outcome.bpb for outcome in of_query] for of_query in outcomes])
    return 100 * bpb / bpb[:, :1]


def standard_error(values: np.ndarray) -> float:
    """The standard error of the mean; nan for a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def in_words(gaps: np.ndarray, sign: str = "") -> str:
    """The mean of paired differences with its standard error (none for one query)."""
    mean, error = abs(gaps.mean()) if not sign else gaps.mean(), standard_error(gaps)
    if np.isnan(error):
        return f"{mean:{sign}.1f} points of base"
    doubt = ", within two standard errors" if abs(mean) <= 2 * error else ""
    return f"{mean:{sign}.1f} ± {error:.1f} points of base{doubt}"


def results_table(outcomes: Sequence[Sequence[Outcome]], dtype: str) -> Table:
    """One row a method, means over the queries. dtype: of the weights."""
    title = f"Mean over the queries ({len(outcomes)}), {dtype} weights"
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    shares = shares_of_base(outcomes)
    for i, of_method in enumerate(zip(*outcomes, strict=True)):
        mean = mean_of(of_method)
        percent, error = shares[:, i].mean(), standard_error(shares[:, i])
        if mean.method == methods.BASE:
            table.add_row(mean.method, *["-"] * 5, f"{mean.bpb:.4f}", "100", end_section=True)
            continue
        table.add_row(
            mean.method,
            f"{mean.distinct:.1f}",
            f"{mean.updates:.1f}",
            f"{mean.passes:.1f}",
            f"{1e3 * mean.select_seconds:.2f}",
            f"{mean.finetune_seconds:.2f}",
            f"{mean.bpb:.4f}",
            f"{percent:.1f}" if np.isnan(error) else f"{percent:.1f} ± {error:.1f}",
            style="bold" if mean.method == methods.HULL else None,
        )
    return table


def closing_lines(outcomes: Sequence[Sequence[Outcome]]) -> list[str]:
    """What the table says about the hull, wins and losses alike, and why."""
    names = [outcome.method for outcome in outcomes[0]]
    column = {name: shares_of_base(outcomes)[:, i] for i, name in enumerate(names)}
    mean = {m.method: m for m in map(mean_of, zip(*outcomes, strict=True))}
    hull, plain = mean[methods.HULL], mean[methods.HULL_PLAIN]
    lines = []
    for question, rival in (
        ("At the same updates", methods.KNN),
        ("At the same updates, two a gradient for kNN too", methods.KNN_TWICE),
        ("At the same passes", methods.KNN_SAME_PASSES),
        ("At the same passes, two updates a gradient for kNN too", methods.KNN_TWICE_SAME_PASSES),
    ):
        gaps = column[methods.HULL] - column[rival]
        lines.append(
            f"{question}: hull with reuse ({hull.passes:.0f} passes) "
            f"{'loses to' if gaps.mean() > 0 else 'beats'} {rival!r} "
            f"({mean[rival].passes:.0f} passes) by {in_words(gaps)}."
        )
    price = in_words(column[methods.HULL] - column[methods.HULL_PLAIN], sign="+")
    lines.append(
        f"Reuse: {plain.passes / hull.passes:.2f}x fewer passes and finetuning "
        f"{plain.finetune_seconds / hull.finetune_seconds:.2f}x faster for the same updates, "
        f"at {price}."
    )
    per_pass = [m.finetune_seconds / m.passes for m in mean.values() if m.passes]
    if max(per_pass) > UNSTEADY * min(per_pass):
        lines.append(
            f"Do not trust the seconds: a pass took {min(per_pass):.2f} to {max(per_pass):.2f} s "
            "depending on the method, though all do the same work. The machine was busy."
        )
    lines.append(
        f"Why the hull can lose: it spends {hull.updates:.0f} updates on {hull.distinct:.0f} "
        f"distinct examples where kNN sees {mean[methods.KNN].distinct:.0f}. On varied text and at "
        "large budgets, variety is worth more than reconstruction."
    )
    return lines
