# SPDX-License-Identifier: Apache-2.0
"""The demo: what test-time finetuning costs and buys, on texts that every machine has.

    make demo                                   # or: python -m bench.demo
    make demo ARGS="--queries 20 --passes 3 6"
    make demo ARGS="--text ~/papers"            # your own works: a folder of text files
    make demo ARGS="--model gpt2 --device cuda --path bf16"

For each query, a chunk of a file that the pool has no part of: the published procedure in its own
loop, the same settings in hullkit, and rules of choosing examples, each at its own best learning
rate. Printed: a table, means over the queries. Saved: BPB against seconds, and one query's hull.
Where bench/results has no rates, they are found on other queries first.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch loads: idle threads sleep. Spinning ones cost seconds a pass if a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from tqdm import tqdm

from bench.demo import corpus, figures, rates, report
from bench.harness import texts
from bench.rivals.published import MAX_LENGTH
from bench.ttft import corpora
from bench.ttft.measure import Bench
from bench.ttft.paths import Hullkit, Published, opened
from bench.ttft.rules import PUBLISHED_LR, PUBLISHED_RULE, Cell

RULES = ("kNN", "SIFT", "hull", "hull, at most 2")
CALIBRATION = 3  # queries, where bench/results has no rates


class Demo(NamedTuple):
    """What the run measured: rows as bench.ttft's, and the files of the pictures."""

    rows: list[dict[str, Any]]
    pictures: list[Path]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, checked as far as they can be without the model and the text."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=texts.OWN_MODEL,
        metavar="NAME_OR_PATH",
        help="any Hugging Face causal LM (default: the byte-level one in bench/assets)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=corpus.stdlib_folder(),
        metavar="DIR",
        help="a folder of text files (default: the standard library)",
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=10,
        metavar="N",
        help=f"default: 10; {CALIBRATION} more if learning rates must be found",
    )
    parser.add_argument(
        "--passes", type=int, nargs="+", default=[3], metavar="N", help="a query, default: 3"
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--path",
        choices=("float32", "bf16", "bfloat16", "lora"),
        default="float32",
        help="hullkit's weights and passes (bf16: float32 weights), default: float32",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR")
    args = parser.parse_args(argv)
    for name, values in (("queries", [args.queries]), ("passes", args.passes)):
        for value in values:
            if value < 1:
                parser.error(f"--{name}: expected an integer >= 1, got {value}")
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
    own = rates.measured(args.model.name, args.path, RULES, args.passes)
    needed = args.queries + (0 if own else CALIBRATION)
    tokens = texts.Tokens(args.model, None, MAX_LENGTH)
    model = texts.language_model(args.model, args.device)
    text = corpora.source_folder(args.text, args.text.name, needed)
    candidates = text.data.candidates.shape[1]
    if max(args.passes) > candidates:
        raise ValueError(
            f"--passes: expected at most {candidates}, the candidates of a query, "
            f"got {max(args.passes)}"
        )
    standard = f"the standard library of Python {platform.python_version()}"
    source = standard if args.text == corpus.stdlib_folder() else args.text
    console.print(
        f"Text: {source}. {len(text.documents)} chunks of up to {corpus.CHUNK_BYTES} bytes to "
        f"train on; {args.queries} to score, from files that the others have no part of.",
        highlight=False,
    )
    bench = Bench(text, tokens, args.device, "python -m bench.demo")
    for query in range(needed):
        bench.score_base(model, query)
    del model
    ways: dict[str, Hullkit | Published] = {
        path: opened(path, args.model, args.device, MAX_LENGTH, 1)
        for path in ("published", args.path)
    }
    for way in ways.values():  # first calls pay for caches, allocations and the thread pools
        bench.run(way, 0, Cell("kNN", 1, PUBLISHED_LR))
    if not own:
        queries = range(args.queries, needed)
        found = rates.calibrated(bench, ways[args.path], args.path, queries, RULES, args.passes)
        own = list(found)
    rows = measure(args, bench, ways, own)

    story = report.Story(rows, args.path, own)
    console.print(story.table())
    for line in story.closing_lines():
        console.print(f"- {line}", highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [args.out / "bpb_over_time.png", args.out / "hull.png"]
    figures.save_time_picture(story, pictures[0])
    figures.save_hull_picture(text, pictures[1])
    console.print("Pictures: " + ", ".join(map(str, pictures)), highlight=False)
    return Demo(rows, pictures)


def measure(
    args: argparse.Namespace, bench: Bench, ways: dict[str, Hullkit | Published], own: list[Cell]
) -> list[dict[str, Any]]:
    """A row for each query and run: the published settings on both ways, then the rules' own."""
    same = [Cell(PUBLISHED_RULE, passes, PUBLISHED_LR) for passes in args.passes]
    runs = [(path, cell) for path in ways for cell in same]
    runs += [(args.path, cell) for cell in own if cell not in same]
    rows = []
    with tqdm(total=args.queries * len(runs), desc="finetuning", unit="run") as progress:
        for query in range(args.queries):
            # Each query begins with another run: a machine that slows down slows all of them.
            first = query % len(runs)
            for path, cell in runs[first:] + runs[:first]:
                head = {"phase": "judge", "model": args.model.name, "path": path}
                rows.append(head | bench.run(ways[path], query, cell))
                progress.update()
    return rows


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
