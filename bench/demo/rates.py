# SPDX-License-Identifier: Apache-2.0
"""Each rule's best learning rate: from bench/results, or found on calibration queries."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from bench.harness.rows import RESULTS
from bench.ttft import analysis
from bench.ttft.measure import Bench
from bench.ttft.paths import Way
from bench.ttft.rules import EVERY, PUBLISHED_BETAS, Cell, rates


def measured(model: str, path: str, rules: Sequence[str], passes: Sequence[int]) -> list[Cell]:
    """A cell for each rule and number of passes; none if bench/results does not have them all."""
    wanted = {"phase": "judge", "best": "yes", "model": model, "path": path}
    wanted["beta2"] = f"{PUBLISHED_BETAS[1]:g}"
    found: dict[tuple[str, int], Cell] = {}
    with (RESULTS / "ttft_cpu.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if all(row[name] == value for name, value in wanted.items()):
                cell = Cell(row["rule"], int(row["budget"]), float(row["lr"]))
                found[cell.rule, cell.budget] = cell
    asked = [(rule, budget) for rule in rules for budget in passes]
    return [found[key] for key in asked] if set(asked) <= found.keys() else []


def calibrated(
    bench: Bench,
    way: Way,
    path: str,
    queries: range,
    rules: Sequence[str],
    passes: Sequence[int],
) -> Iterator[Cell]:
    """The cells with the least mean BPB on these queries."""
    tried = [
        Cell(rule, budget, lr)
        for rule in rules
        for budget in passes
        for lr in rates(path, EVERY[rule], None)
    ]
    rows = [
        {"phase": "calibrate", "path": path} | bench.run(way, query, cell)
        for cell in tqdm(tried, desc="learning rates", unit="rate")
        for query in queries
    ]
    for rule in rules:
        for budget in passes:
            yield Cell(rule, budget, analysis.best_rate(rows, path, rule, budget))
