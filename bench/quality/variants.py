# SPDX-License-Identifier: Apache-2.0
"""Selection rules side by side on real embeddings: what they leave of a query, and what they cost.

    python -m bench.quality.variants FOLDER [--device cuda] [--out rows.csv] [--picture picture.png]

FOLDER holds, for every subset S, S.emb.npy (M, d), S.query_emb.npy (Q, d) and S.candidates.npy
(Q, n). Prints a table and writes one CSV row for each subset and method: means over the queries of
the residual before and after rounding, distinct examples, the largest count and forward-backward
passes at `--limit` updates a gradient; milliseconds for one query and, in a batch of all, for each.
A method's answer passes its gate before it is timed.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hullkit
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.harness import texts
from bench.harness.rows import commit, processor

FIELDS = ["subset", "method", "queries", "n", "d", "dtype", "total", "limit", "hull_residual"]
FIELDS += ["residual", "dual_gap", "touched", "distinct", "largest_count", "passes", "iterations"]
FIELDS += ["ms_alone", "ms_in_batch", "device", "torch", "commit", "command"]
ROUNDS = 15

Select = Callable[..., hullkit.Multiset]


class Subset(NamedTuple):
    name: str
    pool: torch.Tensor  # [M, d]
    query: torch.Tensor  # [Q, d]
    candidates: torch.Tensor  # [Q, n]


def methods(total: int, limit: int) -> dict[str, Select]:
    """What is compared. Another rule needs a line here, and nothing else."""
    hull = partial(hullkit.select, total=total)
    return {
        "knn": partial(hull, method="knn"),
        "vanilla": hull,
        "away": partial(hull, variant="away"),
        "pairwise": partial(hull, variant="pairwise"),
        "fully_corrective": partial(hull, variant="fully_corrective"),
        "sift": partial(hull, method="sift"),
        f"capped at {limit}": partial(hull, max_multiplicity=limit),
        f"knn capped at {limit}": partial(hull, method="knn", max_multiplicity=limit),
        f"sift capped at {limit}": partial(hull, method="sift", max_multiplicity=limit),
    }


def subsets(folder: Path, device: str, dtype: torch.dtype) -> list[Subset]:
    found = []
    for path in sorted(folder.glob("*.query_emb.npy")):
        name = path.name.removesuffix(".query_emb.npy")
        pool, query, candidates = texts.embeddings(folder, name)
        found.append(
            Subset(name, pool.to(device, dtype), query.to(device, dtype), candidates.to(device))
        )
    if not found:
        raise SystemExit(f"{folder}: expected S.query_emb.npy, S.emb.npy and S.candidates.npy")
    return found


def residual_norms(subset: Subset, chosen: hullkit.Multiset, total: int) -> torch.Tensor:
    """||query - sum_j counts_j / total rows_j||, from the rows, in float64."""
    rows = subset.pool[chosen.rows.clamp_min(0)].double()
    shares = chosen.counts.double() / total
    mean = torch.einsum("qs,qsd->qd", shares, rows)
    return (subset.query.double() - mean).norm(dim=1)


def seconds(run: Callable[[], Any], device: str) -> float:
    """Median over ROUNDS calls."""
    times = []
    for _ in range(ROUNDS + 2):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def measure(subset: Subset, select: Select, total: int, limit: int, device: str) -> dict[str, Any]:
    run = partial(select, subset.pool)
    chosen = run(subset.query, candidates=subset.candidates)
    counts, result = chosen.counts, chosen.result
    residual = residual_norms(subset, chosen, total)
    assert (counts.sum(1) == total).all(), "counts must sum to the total"
    assert (counts >= 0).all()
    if chosen.residual_norm is not None:
        torch.testing.assert_close(chosen.residual_norm, residual, rtol=0, atol=1e-5)
    row: dict[str, Any] = {"residual": float(residual.mean())}
    if isinstance(result, hullkit.FrankWolfeResult):
        row |= {
            "hull_residual": float(result.residual_norm.mean()),
            "dual_gap": float(result.dual_gap.mean()),
            "touched": float(result.support_size.double().mean()),
            "iterations": float(result.num_iters.double().mean()),
        }
    one = partial(run, subset.query[0], candidates=subset.candidates[0])
    many = partial(run, subset.query, candidates=subset.candidates)
    return row | {
        "subset": subset.name,
        "queries": len(subset.query),
        "n": subset.candidates.shape[1],
        "d": subset.pool.shape[1],
        "dtype": str(subset.pool.dtype).removeprefix("torch."),
        "distinct": float((counts > 0).double().sum(1).mean()),
        "largest_count": int(counts.max()),
        "passes": float(((counts + limit - 1) // limit).double().sum(1).mean()),
        "ms_alone": 1e3 * seconds(one, device),
        "ms_in_batch": 1e3 * seconds(many, device) / len(subset.query),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    columns = ("subset", "method", "hull_residual", "residual", "dual_gap", "distinct")
    columns += ("largest_count", "passes", "iterations", "ms_alone", "ms_in_batch")
    table = Table(title=f"{rows[0]['device']}, total {rows[0]['total']}: means over the queries")
    for column in columns:
        table.add_column(column, justify="left" if column in ("subset", "method") else "right")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A column for each subset: what is left of the query against distinct examples, and how far
    from the optimum a run may have ended against its time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["subset"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(3.2 * len(names), 5.4), squeeze=False)
    markers = dict(zip(dict.fromkeys(row["method"] for row in rows), "sov^DPX*p", strict=False))
    for (above, below), name in zip(axes.T, names, strict=True):
        for row in (row for row in rows if row["subset"] == name):
            style = {"marker": markers[row["method"]], "s": 44, "alpha": 0.7}
            above.scatter(row["distinct"], row["residual"], label=row["method"], **style)
            if "dual_gap" in row:
                below.scatter(row["ms_in_batch"], row["dual_gap"], **style)
            else:
                below.scatter([], [])  # keeps the colours in step
        above.set_title(name, fontsize=10)
        above.set_xlabel("distinct examples")
        below.set_xlabel("ms a query, in a batch")
        below.set_yscale("log")
        below.set_xlim(left=0.0)
    axes[0][0].set_ylabel(f"residual of {rows[0]['total']} updates")
    axes[1][0].set_ylabel("dual gap")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16"))
    parser.add_argument("--total", type=int, default=50)
    parser.add_argument("--limit", type=int, default=2, help="updates a gradient, and the cap")
    parser.add_argument("--out", type=Path, help="append the rows to this CSV")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    device, total, limit = arguments.device, arguments.total, arguments.limit
    if device == "cpu":
        torch.set_num_threads(1)
    common = {
        "total": total,
        "limit": limit,
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python -m bench.quality.variants FOLDER --device {arguments.device}",
    }
    rows = []
    for subset in subsets(arguments.folder, device, getattr(torch, arguments.dtype)):
        for name, select in methods(total, limit).items():
            row = measure(subset, select, total, limit, device)
            if "capped" in name:
                assert row["largest_count"] <= limit
            rows.append(common | row | {"method": name})
    show(rows, Console(width=170))
    if arguments.out is not None:
        new = not arguments.out.exists()
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )
    if arguments.picture is not None:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
