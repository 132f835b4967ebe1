# SPDX-License-Identifier: Apache-2.0
"""Whether fast finetuning is as good: bits per byte of held-out texts after the published procedure
and after ours, on real text with a real model.

    python -m bench.quality.finetune --texts DIR --model DIR [--subsets A B] [--queries 20]

What the folders hold: bench/harness/texts.py. Each query's examples are the hull's. Every
provider finetunes on the same tokens; the published procedure runs without dropout.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hullkit
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from bench.harness import texts
from bench.harness.rows import append, commit
from bench.rivals import published

BASE, PUBLISHED = "unadapted", "published"
BARS = {"hullkit": 1e-3, "hullkit, bf16": 5e-3}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    texts.add_arguments(parser)
    parser.add_argument("--subsets", nargs="+", default=["python", "sotu"])
    parser.add_argument("--total", type=int, default=20, help="updates of a query")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = texts.Tokens(arguments.model, arguments.start, arguments.max_length)
    model = texts.language_model(arguments.model, device)
    state = published.base_state(model)

    @contextmanager
    def by_published(examples: list[Tensor], counts: list[int]) -> Iterator[None]:
        published.finetune(model, examples, counts, dropout=False, max_length=arguments.max_length)
        yield
        published.restore(model, state)

    providers: dict[str, Callable[..., Any]] = {PUBLISHED: by_published}
    providers["hullkit"] = hullkit.TestTimeFinetuner(model).adapted
    providers["hullkit, bf16"] = hullkit.TestTimeFinetuner(model, precision="bf16").adapted
    found: dict[tuple[str, str], list[float]] = {}
    for subset in arguments.subsets:
        documents = texts.documents(arguments.texts, subset)
        queries = texts.queries(arguments.texts, subset)[: arguments.queries]
        data = texts.embeddings(arguments.texts, subset, slice(arguments.queries)).float()
        chosen = hullkit.select(data.pool, data.query, arguments.total, candidates=data.candidates)
        for query, rows, counts in zip(
            tqdm(queries, desc=subset), chosen.rows, chosen.counts, strict=True
        ):
            ids = tokens(query)
            scored = tokens.scored_bytes(ids)
            kept = [(int(r), int(c)) for r, c in zip(rows, counts, strict=True) if c > 0]
            examples, updates = [tokens(documents[r]) for r, _ in kept], [c for _, c in kept]
            bits = hullkit.bits_per_byte(model, ids, scored)
            found.setdefault((subset, BASE), []).append(bits)
            for name, adapted in providers.items():
                with adapted(examples, updates):
                    bits = hullkit.bits_per_byte(model, ids, scored)
                found.setdefault((subset, name), []).append(bits)
    report(arguments, found)


def report(arguments: argparse.Namespace, found: dict[tuple[str, str], list[float]]) -> None:
    console = Console(width=110)
    columns = (
        "subset",
        "provider",
        "BPB",
        "% of unadapted",
        "from published",
        "largest of a query",
    )
    table = Table(*columns)
    for (subset, name), values in found.items():
        base, wanted = found[subset, BASE], found[subset, PUBLISHED]
        mean = statistics.mean(values)
        apart = mean / statistics.mean(wanted) - 1.0
        largest = max(abs(v / w - 1.0) for v, w in zip(values, wanted, strict=True))
        share = f"{100 * mean / statistics.mean(base):.2f}"
        table.add_row(subset, name, f"{mean:.5f}", share, f"{apart:+.2e}", f"{largest:.2e}")
        if name in BARS:
            met = "met" if abs(apart) <= BARS[name] else "MISSED"
            console.print(f"{met}: {subset}, {name}: {apart:+.2e} (bar {BARS[name]})")
    console.print(table)
    if arguments.out is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        shape = f"{arguments.model.name} queries={arguments.queries} updates={arguments.total}"
        rows = [
            {"op": "bits per byte", "provider": name, "shape": f"{subset} {shape}"}
            | {"dtype": "float32", "p50": round(statistics.mean(values), 6), "unit": "mean BPB"}
            | {"rounds": len(values), "device": device, "torch": torch.__version__}
            | {"commit": commit(), "command": "python -m bench.quality.finetune"}
            for (subset, name), values in found.items()
        ]
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
