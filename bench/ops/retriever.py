# SPDX-License-Identifier: Apache-2.0
"""activeft's Retriever and ours over one faiss index, whole calls: `make bench-retriever`.

200 prompts over 20,000 vectors, 50 choices of 200 candidates each. No time is told unless both made
the same choices for every prompt, with the same values to float32 rounding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from activeft.sift import Retriever as Theirs
from hullkit.interop.activeft import Retriever
from rich.console import Console
from rich.table import Table

from bench.harness.rows import append, processor, row

SIZE, K, N = 20_000, 200, 50
BAR = 100


def vectors(count: int, d: int, centres: Any, rng: np.random.Generator) -> Any:
    """Unit vectors in a hundred clusters."""
    rows = centres[rng.integers(len(centres), size=count)] + 0.8 * rng.normal(size=(count, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    d, prompts = arguments.dim, arguments.prompts
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, d))
    index = faiss.IndexFlatIP(d)
    index.add(vectors(SIZE, d, centres, rng))
    queries = vectors(prompts, d, centres, rng)[:, None]
    threads = torch.get_num_threads()
    ours, theirs = Retriever(index, device="cpu"), Theirs(index)
    runs = {
        "hullkit": (ours, 1, 7),
        "activeft": (theirs, 1, 3),
        f"activeft {threads} threads": (theirs, threads, 3),
    }
    mine, other = (retriever.batch_search(queries, N, K) for retriever in (ours, theirs))
    equal = (mine[1] == other[1]).all(1)
    assert equal.all(), f"{(~equal).sum()} of {prompts} prompts have other choices"
    apart = float(np.abs(mine[0] - other[0]).max())
    assert apart < 1e-5, apart
    times: dict[str, list[float]] = {}
    for name, (retriever, count, rounds) in runs.items():
        torch.set_num_threads(count)
        retriever.batch_search(queries[:4], N, K)
        for _ in range(rounds):
            began = time.perf_counter()
            retriever.batch_search(queries, N, K)
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - began) / prompts)
    torch.set_num_threads(threads)
    console = Console(width=100)
    console.print(f"the same choices for {prompts} prompts, values within {apart:.1e}")
    table = Table("provider", "ms a prompt", "times hullkit's", title=f"on {processor()}")
    p50 = {name: statistics.median(values) for name, values in times.items()}
    for name, value in p50.items():
        table.add_row(name, f"{value:.3f}", f"{value / p50['hullkit']:.0f}")
    console.print(table)
    ratio = p50["activeft"] / p50["hullkit"]
    met = "met" if ratio >= BAR else "MISSED"
    console.print(f"{met}: Retriever.batch_search: {ratio:.0f}x activeft (bar {BAR}x)")
    if arguments.out is not None:
        shape = f"M={SIZE} d={d} K={K} N={N} prompts={prompts}"
        rows = [
            row("interop.activeft", name, shape, "float32", values, threads=runs[name][1])
            for name, values in times.items()
        ]
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
