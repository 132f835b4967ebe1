# SPDX-License-Identifier: Apache-2.0
"""The demo's table and what it says in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from bench.ttft import analysis
from bench.ttft.analysis import Measured, Values
from bench.ttft.rules import PUBLISHED_LR, PUBLISHED_RULE, Cell

UNSTEADY = 1.5  # seconds a pass, slowest rule to fastest: beyond this it is not the rules
COLUMNS = ("", "learning\nrate", "passes", "updates", "seconds\na query", "BPB")
COLUMNS += ("% of base\n[95 %]", "from kNN,\nsame passes")


class Line(NamedTuple):
    """One cell in one way of finetuning, over all queries."""

    label: str
    cell: Cell
    measured: Measured

    @property
    def seconds(self) -> float:
        return analysis.mean(self.measured.seconds)

    @property
    def bpb(self) -> float:
        return analysis.mean(self.measured.column("bpb"))


class Story:
    """The rows of a run as lines: the published procedure, the same in hullkit, the rules.

    path: hullkit's. own: the rules, each at its best learning rate.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], path: str, own: Sequence[Cell]) -> None:
        found = analysis.cells(rows, "judge")
        of = {(key.path, Cell(key.rule, key.budget, key.lr)): value for key, value in found.items()}
        same = [
            Cell(PUBLISHED_RULE, budget, PUBLISHED_LR)
            for budget in dict.fromkeys(cell.budget for cell in own)
        ]
        theirs, ours = "published procedure, its own loop", "the same in hullkit"
        self.published = [Line(theirs, cell, of["published", cell]) for cell in same]
        self.same = [Line(ours, cell, of[path, cell]) for cell in same]
        self.own = [Line(cell.rule, cell, of[path, cell]) for cell in own]
        first = self.same[0].measured
        self.queries = len(first.rows)
        self.base = analysis.mean(first.column("base_bpb"))

    def from_knn(self, line: Line) -> Values | None:
        """Differences query by query, at equal passes."""
        for knn in self.own:
            if knn.label == "kNN" and knn.cell.budget == line.cell.budget:
                return analysis.apart(line.measured.percent, knn.measured.percent)
        return None

    def table(self) -> Table:
        """One row a line, means over the queries."""
        table = Table(title=f"Mean over the queries ({self.queries})", title_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column else "left")
        table.add_row(
            "base, unadapted", *["-"] * 4, f"{self.base:.4f}", "100", "", end_section=True
        )
        for line in (*self.published, *self.same):
            table.add_row(*self._cells(line), "", end_section=line is self.same[-1])
        for line in self.own:
            apart = self.from_knn(line)
            shown = "" if line.label == "kNN" or apart is None else _interval(apart, "+")
            table.add_row(*self._cells(line), shown)
        return table

    def _cells(self, line: Line) -> list[str]:
        updates = analysis.mean(line.measured.column("updates"))
        passes = analysis.mean(line.measured.column("passes"))
        return [
            line.label,
            f"{line.cell.lr:g}",
            f"{passes:.1f}",
            f"{updates:.1f}",
            f"{line.seconds:.2f}",
            f"{line.bpb:.4f}",
            _interval(line.measured.percent),
        ]

    def closing_lines(self) -> list[str]:
        """What the table says, wins and losses alike."""
        lines = [
            f"The same hull at the published settings, {line.cell.budget} passes: "
            f"{theirs.seconds:.2f} s a query in the published loop, {line.seconds:.2f} s in "
            f"hullkit, {theirs.seconds / line.seconds:.1f} times less. BPB {theirs.bpb:.4f} and "
            f"{line.bpb:.4f}."
            for theirs, line in zip(self.published, self.same, strict=True)
        ]
        lines.append(
            "Each rule at its own best learning rate, which is not the published one, lowers BPB "
            "by " + ", ".join(_gain(line) for line in self.own) + "."
        )
        lines += [
            f"{line.label!r} is {_verdict(apart)} at {line.cell.budget} passes "
            f"({_interval(apart, '+')} points)."
            for line in self.own
            if line.label != "kNN" and (apart := self.from_knn(line)) is not None
        ]
        a_pass = [
            line.seconds / analysis.mean(line.measured.column("passes"))
            for line in (*self.same, *self.own)
        ]
        if max(a_pass) > UNSTEADY * min(a_pass):
            lines.append(
                f"Do not trust the seconds: a pass took {min(a_pass):.2f} to {max(a_pass):.2f} s "
                "depending on the rule, though all do the same work. The machine was busy."
            )
        return lines


def _gain(line: Line) -> str:
    percent = 100 - analysis.mean(line.measured.percent)
    return f"{percent:.1f} % ({line.label}, {line.cell.budget} passes, {line.seconds:.2f} s)"


def _verdict(apart: Values) -> str:
    _, low, high = analysis.interval(apart)
    if low <= 0.0 <= high:
        return "not apart from kNN"
    return "better than kNN" if high < 0.0 else "worse than kNN"


def _interval(values: Values, sign: str = "") -> str:
    """The mean with its interval, which takes more than one query."""
    found = analysis.interval(values)
    return found.text(sign, 1) if len(values) > 1 else f"{found.mean:{sign}.1f}"
