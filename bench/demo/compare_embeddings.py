# SPDX-License-Identifier: Apache-2.0
"""What each embedding is worth: BPB after finetuning on the nearest chunks, standard-library text.

Every embedding retrieves for the same held-out queries from the same pool; the model takes one
update on each of the nearest chunks, nearest first. The learning rate is swept in the same way, so
both of the demo's defaults are chosen by kNN, not by the hull. Retrieval is exhaustive here.

    python -m bench.demo.compare_embeddings --device cuda --queries 32 --skip 8 --csv FILE
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hullkit import TestTimeFinetuner, bits_per_byte
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from bench.demo.corpus import read_chunks, split, stdlib_folder
from bench.demo.embedding import Embedding, StateEmbedding, byte_grams, word_grams
from bench.harness.texts import OWN_MODEL, Tokens, language_model
from bench.rivals.published import MAX_LENGTH

COLUMNS = ("embedding", "dims", "lr", "updates", "queries", "seconds to embed the pool")
COLUMNS += ("base BPB", "BPB", "% of base", "s.e.")


def builders(
    model: nn.Module, tokens: Tokens
) -> dict[str, Callable[[], Embedding | StateEmbedding]]:
    """The candidates, by name."""
    states = {
        f"states, layer {layer}": lambda layer=layer: StateEmbedding(model, tokens, layer)
        for layer in (1, 3, 5)
    }
    return {
        "word tf-idf, 384 axes": lambda: Embedding(word_grams),
        "byte tf-idf, 384 axes": lambda: Embedding(byte_grams),
        "word tf-idf, 1024 axes": lambda: Embedding(word_grams, dims=1024, width=4096),
        "word tf-idf, hashed to 384": lambda: Embedding(word_grams, width=384),
        **states,
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--skip", type=int, default=0, help="leave out the demo's own queries")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-4])
    parser.add_argument("--only", nargs="+", help="names of embeddings", metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()

    model = language_model(OWN_MODEL, torch.device(args.device))
    tokens = Tokens(OWN_MODEL, None, MAX_LENGTH)
    text = split(read_chunks(stdlib_folder()), args.queries + args.skip)
    queries = [chunk.text for chunk in text.queries[args.skip :]]
    pool = [chunk.text for chunk in text.pool]
    scored = [(ids, tokens.scored_bytes(ids)) for ids in map(tokens, queries)]
    base = np.array([bits_per_byte(model, *query) for query in scored])

    rows = []
    choices = builders(model, tokens)
    for name in args.only or choices:
        embedding = choices[name]()
        began = time.perf_counter()
        vectors = embedding.fit(pool)
        seconds = time.perf_counter() - began
        nearest = np.argsort(-(embedding(queries) @ vectors.T), axis=1)[:, : args.updates]
        for lr in args.lr:
            tuner = TestTimeFinetuner(model, lr=lr, refresh_interval=1)
            adapted = []
            for query, order in zip(tqdm(scored, desc=f"{name}, lr {lr:g}"), nearest, strict=True):
                examples = [tokens(pool[row]) for row in order]
                with tuner.adapted(examples, [1] * len(examples)) as changed:
                    adapted.append(bits_per_byte(changed, *query))
            share = 100 * np.array(adapted) / base
            error = share.std(ddof=1) / len(share) ** 0.5
            row = (name, vectors.shape[1], f"{lr:g}", args.updates, len(queries), f"{seconds:.1f}")
            row += (f"{base.mean():.4f}", f"{np.mean(adapted):.4f}", f"{share.mean():.2f}")
            rows.append((*row, f"{error:.2f}"))

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=140).print(table)
    if args.csv:
        cuda = args.device.startswith("cuda")
        device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        python = sys.version.split()[0]
        command = f"compare_embeddings.py --queries {args.queries} --skip {args.skip}"
        tail = (device, python, torch.__version__, datetime.date.today(), command)
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow((*COLUMNS, "device", "python", "torch", "date", "command"))
            writer.writerows((*row, *tail) for row in rows)


if __name__ == "__main__":
    main()
