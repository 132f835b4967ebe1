# SPDX-License-Identifier: Apache-2.0
"""The kNN and SIFT selectors that `hullkit.interop.hullft.patch` puts into a package of HullFT's
shape, and what they replace: `python -m bench.ops.hullft_selectors`.

Replaced: a flat faiss index for each query, for SIFT with activeft's Retriever over it. The gate:
the same choices.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from activeft.sift import Retriever
from hullkit.interop import hullft
from rich.console import Console
from rich.table import Table

from bench.harness.problems import neighbours
from bench.harness.rows import append, processor, timings


def flat(pool: Any) -> Any:
    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(pool)
    return index


def activeft(pool: Any, query: Any, total: int, llambda: float, fast: bool = False) -> Any:
    retriever = Retriever(flat(pool), llambda=llambda, fast=fast)
    return retriever.search(query[None], N=total, K=None)[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=200, help="candidates of a query")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--total", type=int, default=50)
    parser.add_argument("--llambda", type=float, default=0.2)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    n, d, total, llambda = arguments.size, arguments.dim, arguments.total, arguments.llambda
    pools, queries = (part.astype(np.float32) for part in neighbours(arguments.queries, n, d))
    sift, knn = hullft.SIFTSelector(llambda), hullft.KNNSelector()
    selectors = {
        ("sift", "patched"): lambda p, q: sift.select(p, q, total)[0],
        ("sift", "activeft"): lambda p, q: activeft(p, q, total, llambda),
        ("sift", "activeft, fast"): lambda p, q: activeft(p, q, total, llambda, fast=True),
        ("knn", "patched"): lambda p, q: knn.select(p, q, total)[0],
        ("knn", "faiss"): lambda p, q: flat(p).search(q[None], total)[1][0],
    }
    shape = f"n={n} d={d} N={total} lambda={llambda:g}"
    times: dict[tuple[str, str, str, str], list[float]] = {}
    table = Table("selector", "provider", "ms a query", "times patched", title=processor())
    for (name, provider), select in selectors.items():
        select(pools[0], queries[0])
        same = 0
        taken = times.setdefault((f"interop.hullft {name}", provider, "float32", shape), [])
        for pool, query in zip(pools, queries, strict=True):
            began = time.perf_counter()
            chosen = select(pool, query)
            taken.append(1e3 * (time.perf_counter() - began))
            same += np.array_equal(chosen, selectors[name, "patched"](pool, query))
        assert provider == "activeft, fast" or same == len(queries), (name, provider, same)
        patched = times[f"interop.hullft {name}", "patched", "float32", shape]
        p50 = statistics.median(taken)
        table.add_row(name, provider, f"{p50:.3f}", f"{p50 / statistics.median(patched):.1f}")
    Console(width=100).print(table)
    if arguments.out is not None:
        append(arguments.out, timings(times, "cpu"))


if __name__ == "__main__":
    main()
