# SPDX-License-Identifier: Apache-2.0
"""Rows of a run: one for each query and cell, in CSV files of one folder, a file for each shard."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.harness.rows import append

Row = dict[str, str]
CELL = ["phase", "model", "path", "rule", "budget", "lr", "beta1", "beta2"]
KEY = [*CELL, "subset", "query"]
FIELDS = [*KEY, "method", "cap", "refresh_interval", "order", "join", "stretch", "noise"]
FIELDS += ["base_bpb", "bpb", "percent", "retrieve_ms", "select_ms", "adapt_ms", "restore_ms"]
FIELDS += ["passes", "updates", "distinct", "tokens", "slots", "peak_mb", "joules"]
FIELDS += ["device", "threads", "torch", "commit", "command"]


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def read(folder: Path) -> list[Row]:
    """All rows of a folder, or of a parquet file; of a key that was measured twice the first."""
    if folder.suffix == ".parquet":
        import pyarrow.parquet

        found: list[Row] = pyarrow.parquet.read_table(folder).to_pylist()
        return found
    rows: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if None not in row.values():  # a run that was cut off may end within a line
                    rows.setdefault(key(row), row)
    return list(rows.values())


def write(folder: Path, shard: int, rows: Iterable[dict[str, Any]]) -> None:
    append(folder / f"rows-{shard}.csv", list(rows), FIELDS)


def write_parquet(rows: list[Row], path: Path) -> bool:
    """False, and nothing written, if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        return False
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="zstd")
    return True
