# SPDX-License-Identifier: Apache-2.0
"""What finetuning in half precision loses: bits per byte of a model loaded in float32, bfloat16 and
float16, with every default of TestTimeFinetuner, on the same queries.

    python -m bench.quality.half_precision --texts DIR --model DIR [--queries 10] [--subsets A B]
    python -m bench.quality.half_precision --report             # the table from the CSV, no model

What the folders hold: bench/harness/texts.py. Percentages are of the unadapted float32 model.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import hullkit
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from bench.harness import texts
from bench.harness.rows import RESULTS, append, commit, processor

CSV = RESULTS / "half_precision.csv"
FIELDS = ["subset", "query", "rule", "lr", "weights", "rounding", "passes", "base_bpb", "bpb"]
FIELDS += ["device", "torch", "commit", "command"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "knn 20": (20, {"method": "knn"}),
    "hull 40, at most 2": (40, {"max_multiplicity": 2}),
}
RATES = (5e-5, 1e-4)


def chosen(data: texts.Embeddings) -> dict[str, list[tuple[list[int], list[int]]]]:
    """For each rule and query, rows of the documents and their counts."""
    found: dict[str, list[tuple[list[int], list[int]]]] = {}
    for rule, (total, options) in RULES.items():
        selected = hullkit.select(
            data.pool, data.query, total, candidates=data.candidates, **options
        )
        found[rule] = [
            (rows[counts > 0].tolist(), counts[counts > 0].tolist())
            for rows, counts in zip(selected.rows, selected.counts, strict=True)
        ]
    return found


def measure(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = texts.Tokens(arguments.model, arguments.start, arguments.max_length)
    work: list[tuple[str, int, Tensor, int, str, list[Tensor], list[int]]] = []
    for subset in arguments.subsets:
        data = texts.embeddings(arguments.texts, subset, slice(arguments.queries)).float()
        documents = texts.documents(arguments.texts, subset)
        asked = texts.queries(arguments.texts, subset)[: arguments.queries]
        for rule, choices in chosen(data).items():
            for query, (text, (rows, counts)) in enumerate(zip(asked, choices, strict=True)):
                ids = tokens(text)
                examples = [tokens(documents[row]) for row in rows]
                work.append((subset, query, ids, tokens.scored_bytes(ids), rule, examples, counts))
    common = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python -m bench.quality.half_precision --max-length {arguments.max_length}",
    }
    for weights in arguments.weights:
        model = texts.language_model(arguments.model, device).to(DTYPES[weights])
        tuner = hullkit.TestTimeFinetuner(model, rounding=arguments.rounding)
        for subset, query, ids, scored, rule, examples, counts in tqdm(work, desc=weights):
            base = hullkit.bits_per_byte(model, ids, scored)
            rows = []
            for rate in RATES:
                tuner.lr = rate
                with tuner.adapted(examples, counts) as adapted:
                    bits = hullkit.bits_per_byte(adapted, ids, scored)
                report = tuner.last_report
                rows.append(
                    {"subset": subset, "query": query, "rule": rule, "lr": rate}
                    | {"weights": weights, "rounding": arguments.rounding}
                    | {"passes": report.num_passes, "base_bpb": f"{base:.6f}"}
                    | {"bpb": f"{bits:.6f}"}
                    | common
                )
            append(arguments.out, rows, FIELDS)


def show(path: Path) -> None:
    base: dict[Any, float] = {}
    bits: dict[Any, list[tuple[Any, float]]] = defaultdict(list)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["commit"] != rows[-1]["commit"]:
            continue  # the latest build's alone
        query = (row["subset"], row["query"])
        if row["weights"] == "float32":
            base[query] = float(row["base_bpb"])
        key = (row["rule"], row["lr"], row["weights"], row["rounding"])
        bits[key].append((query, float(row["bpb"])))
    table = Table(title="BPB in % of the unadapted float32 model, mean")
    for column in ("selection", "lr", "weights", "rounding", "queries", "%"):
        table.add_column(column)
    for (rule, rate, weights, rounding), values in sorted(bits.items()):
        share = statistics.mean(100 * value / base[query] for query, value in values)
        table.add_row(rule, rate, weights, rounding, str(len(values)), f"{share:.2f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    texts.add_arguments(parser, required=False)
    parser.add_argument("--subsets", nargs="+", default=["python", "kernel_docs", "sotu"])
    parser.add_argument("--weights", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounding", choices=["stochastic", "nearest"], default="stochastic")
    parser.add_argument("--out", type=Path, default=CSV, help="append the rows to this file")
    parser.add_argument("--report", action="store_true", help="of the rows in --out; no model")
    arguments = parser.parse_args()
    if not arguments.report:
        if arguments.texts is None or arguments.model is None:
            parser.error("--texts and --model are needed, or --report")
        measure(arguments)
    show(arguments.out)


if __name__ == "__main__":
    main()
