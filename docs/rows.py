# SPDX-License-Identifier: Apache-2.0
"""The committed rows of bench/results, and how a figure is written."""

from __future__ import annotations

import csv
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
Row = dict[str, str]

H100 = "NVIDIA H100 80GB HBM3"

# Rows have a model's folder or its shape; pages have one name for each.
MODEL_NAMES = {
    "GPT-2 small": "GPT-2 124M",
    "gpt2": "GPT-2 124M",
    "smollm2": "SmolLM2-135M",
    "smollm2-135m": "SmolLM2-135M",
}


def model_name(name: str) -> str:
    return MODEL_NAMES.get(name, name)


@functools.cache
def rows(name: str) -> tuple[Row, ...]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


def find(name: str, **wanted: str) -> list[Row]:
    """Rows of one file whose columns have exactly these values."""
    return [row for row in rows(name) if all(row[key] == value for key, value in wanted.items())]


def one(name: str, **wanted: str) -> Row:
    """The only such row. More than one, or none, is an error: a table must say what it shows."""
    found = find(name, **wanted)
    if len(found) != 1:
        raise LookupError(f"{name}.csv: expected one row with {wanted}, got {len(found)}")
    return found[0]


def median(name: str, **wanted: str) -> float:
    return float(one(name, **wanted)["p50"])


def mean(found: Iterable[Row], column: str) -> float:
    return statistics.mean(float(row[column]) for row in found)


def figure(value: float, digits: int = 3) -> str:
    """`digits` significant ones, never in powers of ten."""
    text = f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.0f}" if "e" in text else text


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{figure(ratio, 2)}x"


def gib(megabytes: str) -> str:
    return f"{float(megabytes) / 1024:.1f}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; all columns but the first few are right-aligned."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def gpu_name(row: Row) -> str:
    """The device without what only tells its memory; a row of two devices names both."""
    return row["device"].replace(" 80GB HBM3", "")


def source(row: Row, *, several: bool = False) -> str:
    """Where rows like this one were measured. several: their table says which commits."""
    place = [row["device"]]
    if row["device"].startswith("AMD"):
        place += [row["simd"]] if row.get("simd") else []
        place += {"1": ["one thread"], "2": ["two threads"]}.get(row.get("threads", ""), [])
    torch = f"torch {row['torch']}"
    commit = "commits as in the table" if several else f"commit {row['commit']}"
    return ", ".join([*place, torch, commit, f"`{row['command']}`"]) + "."


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.csv").exists()


def when_measured(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """A block says so while the file of rows is not there."""

    def wrap(block: Callable[[], str]) -> Callable[[], str]:
        @functools.wraps(block)
        def written() -> str:
            return block() if measured(name) else "Not measured yet."

        return written

    return wrap


TABLES: dict[str, Callable[[], str]] = {}


def generated(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a block under its function's name."""
    TABLES[function.__name__] = function
    return function
