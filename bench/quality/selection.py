# SPDX-License-Identifier: Apache-2.0
"""What each selection rule is worth: bits per byte after finetuning on its choice, by total updates
and by forward-backward passes, on real text with a real model.

    python -m bench.quality.selection --texts DIR --model DIR [--subsets A B] [--queries 20]
    python -m bench.quality.selection --report          # table and picture from the CSV, no model
    python -m bench.quality.selection --calibrate --texts DIR       # total="auto", from the CSV

What the folders hold: bench/harness/texts.py. Every rule's examples are visited in the order that
`select` returns, two updates a gradient, in bf16 passes. Queries go round the subsets, and their
rows are written as they come: a run that ends early has measured all subsets alike. Rules and
totals that choose the same multiset share a finetuning. "hull, one run" is the hull of the largest
total, rounded to each total: what total="auto" chooses from.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hullkit
import torch
from torch import Tensor
from tqdm import tqdm

from bench.harness import texts
from bench.harness.rows import RESULTS, ROOT, append, commit, processor
from bench.quality import auto_total
from bench.quality import report as quality_report
from bench.quality.variants import residual_norms

CSV = RESULTS / "selection_quality.csv"
PICTURE = ROOT / "docs" / "selection_quality.png"
INTERVAL = 2  # updates a gradient, and the cap


class Rule(NamedTuple):
    method: str
    cap: int | None = None
    share: float = 1.0  # of the largest total: beyond it a rule that takes a pass an update is dear


RULES = [
    Rule("knn", share=0.6),
    Rule("knn", INTERVAL),
    Rule("sift", share=0.6),
    Rule("sift", INTERVAL),
    Rule("hull"),
    Rule("hull", INTERVAL),
    Rule(quality_report.ONE_RUN),
    Rule(quality_report.ONE_RUN, INTERVAL),
]


def passes(counts: Tensor) -> Tensor:
    return ((counts + INTERVAL - 1) // INTERVAL).sum(-1)


def one_run(data: texts.Embeddings, total: int, largest: int, cap: int | None) -> hullkit.Multiset:
    """select(total=largest), its weights rounded to `total` instead."""
    pool, query, candidates = data
    chosen = hullkit.select(pool, query, largest, candidates=candidates, max_multiplicity=cap)
    counts = hullkit.round_multiplicities(
        pool, query, chosen.result, total, candidates=candidates, max_multiplicity=cap
    )
    return chosen._replace(counts=counts)


def choices(
    data: texts.Embeddings, totals: list[int]
) -> Iterator[tuple[Rule, int, hullkit.Multiset]]:
    pool, query, candidates = data
    largest = max(totals)
    for rule in RULES:
        for total in (t for t in totals if t <= rule.share * largest or len(totals) == 1):
            if rule.method == quality_report.ONE_RUN:
                yield rule, total, one_run(data, total, largest, rule.cap)
                continue
            options = {"method": rule.method, "max_multiplicity": rule.cap}
            yield rule, total, hullkit.select(pool, query, total, candidates=candidates, **options)


def described(data: texts.Embeddings, totals: list[int]) -> list[list[dict[str, Any]]]:
    """For each query the rows to be, and under "multiset" what to train on, and how often."""
    pool, query, candidates = data
    hull = hullkit.frank_wolfe(pool, query, candidates=candidates, variant="fully_corrective")
    found: list[list[dict[str, Any]]] = [[] for _ in query]
    for rule, total, chosen in choices(data, totals):
        residual, spent = residual_norms(data, chosen, total), passes(chosen.counts)
        gap = getattr(chosen.result, "dual_gap", None)
        variance = getattr(chosen.result, "variance", None)
        for q, rows in enumerate(found):
            kept = chosen.counts[q] > 0
            rows.append(
                {"query": q, "method": rule.method, "cap": rule.cap or "", "total": total}
                | {"passes": int(spent[q]), "distinct": int(kept.sum())}
                | {"hull_residual": f"{float(hull.residual_norm[q]):.6g}"}
                | {"dual_gap": "" if gap is None else f"{float(gap[q]):.4g}"}
                | {"residual": f"{float(residual[q]):.6g}"}
                | {"variance": "" if variance is None else f"{float(variance[q, -1]):.6g}"}
                | {"multiset": (chosen.rows[q, kept].tolist(), chosen.counts[q, kept].tolist())}
            )
    return found


def measure(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = texts.Tokens(arguments.model, arguments.start, arguments.max_length)
    model = texts.language_model(arguments.model, device)
    tuner = hullkit.TestTimeFinetuner(model, precision="bf16", refresh_interval=INTERVAL)
    window = slice(arguments.first, arguments.first + arguments.queries)
    common = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python -m bench.quality.selection --max-length {arguments.max_length}",
    }
    work = []
    for subset in arguments.subsets:
        data = texts.embeddings(arguments.texts, subset, window).float()
        asked = texts.queries(arguments.texts, subset)[window]
        documents = texts.documents(arguments.texts, subset)
        for query, rows in zip(asked, described(data, arguments.totals), strict=True):
            work.append((rows[0]["query"], subset, query, documents, rows))
    work.sort(key=lambda item: item[0])  # stable: round the subsets
    bar = tqdm(total=sum(len(rows) for *_, rows in work), unit="run")
    for _, subset, query, documents, rows in work:
        if time.perf_counter() - began > 60 * arguments.minutes:
            bar.write(f"{arguments.minutes} minutes are over: stopped before {subset}, a query on")
            break
        ids = tokens(query)
        scored = tokens.scored_bytes(ids)
        base = hullkit.bits_per_byte(model, ids, scored)
        examples: dict[int, Tensor] = {}  # a query's rules choose much the same
        bits: dict[Any, float] = {}
        for row in rows:
            chosen, counts = row.pop("multiset")
            key = (*chosen, -1, *counts)
            if key not in bits:
                examples |= {r: tokens(documents[r]) for r in chosen if r not in examples}
                with tuner.adapted([examples[r] for r in chosen], counts) as adapted:
                    bits[key] = hullkit.bits_per_byte(adapted, ids, scored)
            row["query"] += arguments.first
            row |= {"subset": subset, "base_bpb": f"{base:.6f}", "bpb": f"{bits[key]:.6f}"}
            row |= common
            bar.update()
        append(arguments.out, rows, quality_report.FIELDS)
    bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    texts.add_arguments(parser, required=False)
    parser.add_argument("--subsets", nargs="+", default=["python", "kernel_docs", "sotu"])
    parser.add_argument("--first", type=int, default=0, help="query to begin with")
    parser.add_argument("--totals", type=int, nargs="+", default=[5, 10, 20, 30, 50])
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no query after these")
    parser.add_argument("--out", type=Path, default=CSV, help="append the rows to this file")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--report", action="store_true", help="of the rows in --out; no model")
    parser.add_argument("--calibrate", action="store_true", help="of the rows in --out; no model")
    arguments = parser.parse_args()
    if arguments.calibrate:
        if arguments.texts is None:
            parser.error("--texts is needed to calibrate: its embeddings")
        auto_total.calibrate(arguments.out, arguments.texts)
        return
    if not arguments.report:
        if arguments.texts is None or arguments.model is None:
            parser.error("--texts and --model are needed, or --report")
        measure(arguments)
    quality_report.show(arguments.out, arguments.picture)


if __name__ == "__main__":
    main()
