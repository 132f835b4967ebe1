"""The tables of a run, and its summary for bench/results."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.ttft import analysis
from bench.ttft.analysis import ALL, CellKey, Queries
from bench.ttft.store import Row, write_parquet


def show(rows: list[Row]) -> None:
    console = Console(width=170)
    for phase in ("calibrate", "explore"):
        found = analysis.cells(rows, phase)
        if found:
            console.print(_rates(found, phase))


def _rates(found: dict[CellKey, Queries], phase: str) -> Table:
    table = Table("path", "rule", "passes", "lr", "betas", "queries", "% of base", title=phase)
    for cell, queries in sorted(found.items()):
        table.add_row(
            cell.path,
            cell.rule,
            str(cell.budget),
            f"{cell.lr:g}",
            f"{cell.betas}",
            str(len(queries)),
            analysis.mean(analysis.percent(queries)).text(),
        )
    return table
