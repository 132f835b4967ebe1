# SPDX-License-Identifier: Apache-2.0
"""`make bench`: times every operation against its rivals, prints ratios and bars, writes rows.

Rows go to a CSV (--out): op, provider, shape, dtype, p20, p50, p80 in ms, device, versions, commit,
command. Ratios are taken within the run. Each case passes its correctness gate before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.rows import ROOT, append, row

# (op, start of the shape, provider, rival with any number of threads for N, least ratio of their
# medians)
BARS = (
    ("sift", "gaussian n=200 d=1024", "hullkit", "activeft N threads", 300),
    ("sift", "neighbours n=200 d=1024", "hullkit", "activeft N threads", 300),
    ("select", "gaussian n=200 d=1024", "hullkit", "numpy", 120),
    ("select", "gaussian n=200 d=384", "hullkit", "numpy", 150),
    ("interop.hullft", "gaussian n=200 d=1024", "hullkit", "numpy", 60),
    ("interop.hullft", "neighbours n=200 d=1024", "hullkit", "numpy", 60),
    ("select", "neighbours B=64 n=200 d=384", "hullkit 2 threads", "hullkit 1 thread", 1.8),
    ("select", "neighbours B=64 n=200 d=1024", "hullkit 2 threads", "hullkit 1 thread", 1.8),
)


def _measure(keyword: str) -> list[dict[str, Any]]:
    """Runs the benchmarks in their own process, BLAS on one thread, and reads the report."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(ROOT / "bench" / "harness" / "timed_ops.py"),
            "-q",
            "-k",
            keyword,
        ]
        command += ["-o", "python_files=timed_*.py", "-o", "python_functions=bench_*"]
        command += ["-o", f"pythonpath={ROOT}", "--benchmark-json", str(report)]
        command += [
            "--benchmark-warmup=on",
            "--benchmark-min-rounds=15",
            "--benchmark-max-time=0.7",
        ]
        command += ["--benchmark-disable-gc", "--benchmark-columns=median", "--benchmark-sort=name"]
        subprocess.run(command, cwd=ROOT, env=os.environ | threads, check=True)
        benchmarks: list[dict[str, Any]] = json.loads(report.read_text())["benchmarks"]
    return benchmarks


def _rows(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from hullkit import build_info

    rows = []
    for entry in benchmarks:
        info, times = entry["extra_info"], entry["stats"]["data"]
        threads = re.search(r"(\d+) threads?$", info["provider"])
        rows.append(
            row(**info, values=[1e3 * time for time in times], peak_mb="")
            | {"threads": int(threads[1]) if threads else 1, "simd": build_info()["simd"]}
        )
    return rows


def _median(rows: list[dict[str, Any]], op: str, shape: str, provider: str) -> float | None:
    name = re.escape(provider).replace("N", r"\d+")
    for own in rows:
        if (
            own["op"] == op
            and own["shape"].startswith(shape)
            and re.fullmatch(name, own["provider"])
        ):
            return float(own["p50"])
    return None


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        title=f"median ms on {rows[0]['device']}, {rows[0]['simd']}, one thread unless said"
    )
    for column in ("op", "shape", "provider", "p50 ms", "times hullkit's"):
        table.add_column(
            column, justify="left" if column in ("op", "shape", "provider") else "right"
        )
    for entry in rows:
        op, shape, provider, p50 = (entry[key] for key in ("op", "shape", "provider", "p50"))
        own = [other for other in rows if (other["op"], other["shape"]) == (op, shape)]
        base = next(other for other in own if other["provider"].startswith("hullkit"))
        table.add_row(op, shape, provider, f"{p50:.4f}", f"{p50 / base['p50']:.2f}")
    console.print(table)
    for op, shape, provider, rival, least in BARS:
        ours, theirs = _median(rows, op, shape, provider), _median(rows, op, shape, rival)
        if ours is None or theirs is None:
            continue
        verdict = "met" if theirs / ours >= least else "MISSED"
        console.print(f"{verdict}: {op}, {shape}: {theirs / ours:.2f}x {rival} (bar {least}x)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "-k", default="", metavar="EXPRESSION", help="only cases that match, as in pytest"
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    rows = _rows(_measure(arguments.k))
    _print(rows, Console(width=150))
    if arguments.out is not None:
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
