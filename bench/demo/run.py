# SPDX-License-Identifier: Apache-2.0
"""The demo: test-time finetuning of a small language model on the standard library's own source.

    make demo                                   # or: python bench/demo/run.py
    make demo ARGS="--queries 20 --updates 32"
    make demo ARGS="--model gpt2 --lr 5e-5 --text ~/papers --device cuda --dtype bfloat16"

For each query, a chunk of a file that the pool has no part of: retrieve candidates from the pool,
choose examples (hullkit.select), finetune on them (hullkit.TestTimeFinetuner), score the query
(hullkit.bits_per_byte), put the base weights back. Printed: one row a method, means over the
queries. Saved: BPB against seconds, and one query's hull.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Read when torch loads: idle threads sleep. Spinning ones cost seconds a pass if a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# faiss and torch each bring an OpenMP runtime; torch's must be loaded first on some platforms.
import torch  # isort: skip
import corpus
import faiss
import figures
import language_model
import methods
import numpy as np
from embedding import Embedding
from methods import Outcome, Plan
from report import closing_lines, mean_of, results_table
from rich.console import Console
from tqdm import tqdm

NUM_CANDIDATES = 200  # as in the published runs
# Best of 5e-5, 1e-4, 2e-4, 3e-4, 5e-4 for kNN on other queries (bench/results/embeddings.csv).
DEFAULT_LR = 1e-4


class Demo(NamedTuple):
    """What the run measured."""

    means: list[Outcome]
    outcomes: list[list[Outcome]]  # a list for each query, in the order of `means`
    pictures: list[Path]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, checked as far as they can be without the model and the text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        default=str(language_model.OWN_MODEL),
        metavar="NAME_OR_PATH",
        help="any Hugging Face causal LM (default: the byte-level one in bench/)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=corpus.stdlib_folder(),
        metavar="DIR",
        help="a folder of text files (default: the standard library)",
    )
    parser.add_argument("--queries", type=int, default=5, metavar="N")
    parser.add_argument("--updates", type=int, default=16, metavar="N", help="updates per query")
    parser.add_argument(
        "--refresh-interval",
        type=int,
        default=2,
        metavar="R",
        help="updates per gradient in 'hull with reuse'",
    )
    parser.add_argument("--device", default="cpu", help="of the model; selection is on the CPU")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the model's weights, in which it is finetuned and scored (default: float32)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=DEFAULT_LR,
        help="tuned for the default model; the published runs use 5e-5 for GPT-2",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR")
    args = parser.parse_args(argv)  # fmt: skip
    for name in ("queries", "updates", "refresh_interval"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected an integer >= 1, got {getattr(args, name)}")
    if not 0 < args.lr < 1:
        parser.error(f"--lr: expected a learning rate in (0, 1), got {args.lr}")
    if not args.text.is_dir():
        parser.error(f"--text: expected a folder, got {str(args.text)!r}")
    try:
        args.device = torch.device(args.device)
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--device: expected a usable device, got {str(args.device)!r} ({reason})")
    return args


def run(args: argparse.Namespace, console: Console) -> Demo:
    """The whole demo; prints as it goes."""
    files = corpus.read_chunks(args.text)
    if not files:
        raise ValueError(f"--text: expected text files under {str(args.text)!r}, found none")
    text = corpus.split(files, args.queries)
    num_candidates = min(NUM_CANDIDATES, len(text.pool))
    if args.updates > num_candidates:
        raise ValueError(
            f"--updates: expected at most {num_candidates}, the candidates of a query, "
            f"got {args.updates}"
        )
    lm = language_model.load(args.model, args.device, getattr(torch, args.dtype))
    own_text = args.text == corpus.stdlib_folder()
    source = (
        f"the standard library of Python {platform.python_version()}" if own_text else args.text
    )
    console.print(
        f"Text: {source}, {len(files)} files. Pool: {len(text.pool)} chunks of up to "
        f"{corpus.CHUNK_BYTES} bytes. Queries: {len(text.queries)}, each from a file of its own "
        f"that the pool has no part of; {text.near_copies} near-copies of the pool passed over.",
        highlight=False,
    )

    embedding = Embedding()
    vectors = embedding.fit([chunk.text for chunk in text.pool])  # [M, d]
    queries = embedding([chunk.text for chunk in text.queries])  # [B, d]
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    began = time.perf_counter()
    _, found = index.search(queries, num_candidates)  # [B, n]
    retrieval_ms = 1e3 * (time.perf_counter() - began) / len(queries)
    pool, candidates = torch.from_numpy(vectors), torch.from_numpy(found)

    @cache
    def tokens_of(row: int) -> torch.Tensor:
        return language_model.encode(lm.tokenizer, text.pool[row].text).ids

    scored = [language_model.encode(lm.tokenizer, chunk.text) for chunk in text.queries]

    def plans_of(i: int) -> list[Plan]:
        query = torch.from_numpy(queries[i])
        return methods.plans(pool, query, candidates[i], args.updates, args.refresh_interval)

    # Warm-up, discarded: first calls pay for caches, allocations and the thread pools.
    warm_up(lm, plans_of(0)[0], scored[0], tokens_of, args.lr)
    all_plans = [plans_of(i) for i in range(len(queries))]

    outcomes: list[list[Outcome]] = []
    passes = sum(plan.passes for plans in all_plans for plan in plans)
    with tqdm(total=passes, desc="finetuning", unit="pass") as progress:
        for i, (query, plans) in enumerate(zip(scored, all_plans, strict=True)):
            measured = {}
            # Each query begins with another method: a machine that slows down slows all of them.
            for plan in plans[i % len(plans) :] + plans[: i % len(plans)]:
                measured[plan.method] = methods.measure(lm, plan, query, tokens_of, args.lr)
                progress.update(plan.passes)
            base = methods.base(lm, query)
            outcomes.append([base, *(measured[plan.method] for plan in plans)])

    means = [mean_of(of_method) for of_method in zip(*outcomes, strict=True)]
    console.print(results_table(outcomes, args.dtype))
    console.print(
        f"Retrieval (faiss, {num_candidates} candidates): {retrieval_ms:.1f} ms a query, the same "
        f"for every method. Adam, lr {args.lr:g}. Device: {args.device}; "
        f"{torch.get_num_threads()} CPU threads.",
        highlight=False,
    )
    for line in closing_lines(outcomes):
        console.print(f"- {line}", highlight=False)

    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [args.out / "bpb_over_time.png", args.out / "hull.png"]
    figures.save_time_picture(means, len(queries), pictures[0])
    hull = next(plan for plan in all_plans[0] if plan.method == methods.HULL)
    figures.save_hull_picture(
        vectors, queries[0], np.asarray(found[0]), hull, text.queries[0].file, pictures[1]
    )
    console.print("Pictures: " + ", ".join(map(str, pictures)), highlight=False)
    return Demo(means, outcomes, pictures)


def warm_up(
    lm: language_model.LanguageModel,
    plan: Plan,
    query: language_model.Tokens,
    tokens_of: Callable[[int], torch.Tensor],
    lr: float,
) -> None:
    """One pass and one update that no timing sees."""
    short = plan._replace(rows=plan.rows[:1], counts=plan.counts[:1])
    methods.measure(lm, short, query, tokens_of, lr)


def main(argv: list[str] | None = None) -> Demo:
    """Run the demo; a bad option ends it with one line."""
    args = parse(argv)
    try:
        return run(args, Console(width=None if sys.stdout.isatty() else 120))
    except ValueError as error:
        # Options that only the text or the model could refute name themselves.
        if str(error).startswith("--"):
            raise SystemExit(f"error: {error}") from error
        raise


if __name__ == "__main__":
    main()
