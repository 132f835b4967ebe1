# SPDX-License-Identifier: Apache-2.0
"""What test-time finetuning costs and what it buys, a row for each query and cell.

    python -m bench.ttft calibrate --out DIR --texts DIR --model DIR    # learning rates
    python -m bench.ttft explore   --out DIR ...    # other ideas, on the calibration queries
    python -m bench.ttft judge     --out DIR ...    # other queries, each rule at its best rate
    python -m bench.ttft report    --out DIR [--summary CSV]            # tables; no model

Several phases in one call share the model and its captured passes. Without --texts it takes the
standard library's own source; --texts is a folder in the format of bench/harness/texts.py or any
folder of text files. Without --model it takes the byte-level model in bench/assets. Rows that are
there already are not measured again, so a run that stopped goes on where it was. `--shard 0/4` to
`--shard 3/4`, begun together, share the work: each judges when all have calibrated.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Read when torch loads: idle threads sleep. Spinning ones cost seconds a pass if a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tqdm import tqdm

from bench.harness import texts
from bench.ttft import corpora, report, store
from bench.ttft.analysis import best_idea, best_rate
from bench.ttft.measure import Bench
from bench.ttft.paths import PATHS, Together, Way, opened
from bench.ttft.rules import (
    ADAPTERS,
    EVERY,
    IDEAS,
    PUBLISHED_LR,
    PUBLISHED_RULE,
    RULES,
    Cell,
    rates,
)

PHASES = ("calibrate", "explore", "judge")
BETAS = [(0.9, 0.95), (0.9, 0.99), (0.8, 0.95), (0.5, 0.9)]


def cells(arguments: argparse.Namespace, phase: str, path: str) -> Iterator[Cell]:
    """The phase's cells of one path."""
    if path == "many" and phase != "judge":
        return  # its rates are those of one prompt's adapter
    middle = arguments.budgets[len(arguments.budgets) // 2]
    if phase == "calibrate":
        for name in arguments.rules or RULES:
            for budget in arguments.budgets:
                tried = rates(path, EVERY[name], arguments.steps)
                yield from (Cell(name, budget, lr) for lr in tried)
    elif phase == "explore":
        for name in arguments.ideas:
            yield from (Cell(name, middle, lr) for lr in rates(path, EVERY[name], None)[1:-1])
        for betas in BETAS:
            knn = rates(path, EVERY["kNN"], None)[1:-1]
            yield from (Cell("kNN", middle, lr, betas) for lr in knn)
    elif path == "published":
        for name in arguments.rules or [PUBLISHED_RULE]:
            yield from (Cell(name, budget, PUBLISHED_LR) for budget in arguments.budgets)
    else:
        yield from dict.fromkeys(judged_cells(arguments, path, store.read(arguments.out)))


def judged_cells(arguments: argparse.Namespace, path: str, rows: list[store.Row]) -> Iterator[Cell]:
    """Each rule at its best rate, the published settings, and the idea that explored best."""
    names = arguments.rules or RULES
    for name in names:
        for budget in arguments.budgets:
            yield Cell(name, budget, best_rate(rows, path, name, budget))
    if PUBLISHED_RULE in names and path not in ADAPTERS:
        for budget in arguments.budgets:
            yield Cell(PUBLISHED_RULE, budget, PUBLISHED_LR)
    explored = best_idea(rows, path)
    if explored is not None:
        yield Cell(*explored)


Share = tuple[Bench, list[int]]  # a corpus and the queries of it that are measured together
Work = list[tuple[Bench, list[int], Cell]]


def window(
    arguments: argparse.Namespace, phase: str, path: str, benches: list[Bench]
) -> list[Share]:
    """This shard's queries, round the subsets: a run that ends early has measured all alike."""
    number, of = arguments.shard
    first = arguments.calibration if phase == "judge" else 0
    last = first + arguments.judged if phase == "judge" else arguments.calibration
    if path == "many":
        return [(bench, list(range(first, last))) for bench in benches[number::of]]
    return [
        (bench, [query])
        for query in range(first, last)
        for place, bench in enumerate(benches)
        if (query + place) % of == number
    ]


def measure(arguments: argparse.Namespace, phases: list[str]) -> None:
    """All phases; stops where the time is over."""
    ends = time.perf_counter() + 60 * arguments.minutes
    device = torch.device(arguments.device)
    tokens = texts.Tokens(arguments.model, arguments.start, arguments.max_length)
    command = f"python -m bench.ttft {' '.join(phases)} --max-length {arguments.max_length}"
    most = arguments.calibration + arguments.judged
    loaded = corpora.load(arguments.texts, arguments.subsets, most)
    benches = [Bench(corpus, tokens, device, command) for corpus in loaded]
    model = texts.language_model(arguments.model, device)
    shares = [
        window(arguments, phase, path, benches) for phase in phases for path in arguments.paths
    ]
    for bench, query in {
        (bench, i) for share in shares for bench, queries in share for i in queries
    }:
        bench.score_base(model, query)
    for bench in benches:
        bench.retrieve_ms(0)  # the first one fills caches
    del model
    names = [*(arguments.rules or RULES), *arguments.ideas]
    longest = max(arguments.max_length, *(EVERY[name].join for name in names))
    for path in arguments.paths:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        way = opened(path, arguments.model, device, arguments.max_length, arguments.slots)
        way.warm_up(range(32, longest + 1, 32))
        for phase in phases:
            if phase == "judge" and path != "published":
                wait_for_calibration(arguments, phases, path, len(benches), ends)
            work = left(arguments, phase, path, benches)
            if not run(arguments, phase, path, way, work, ends):
                print(f"{arguments.minutes} minutes are over; the same command goes on from here")
                return
        del way


def left(arguments: argparse.Namespace, phase: str, path: str, benches: list[Bench]) -> Work:
    """What has no row yet."""
    done = {store.key(row) for row in store.read(arguments.out)}
    head = {"phase": phase, "model": arguments.model.name, "path": path}
    wanted = list(cells(arguments, phase, path))
    return [
        (bench, queries, cell)
        for bench, queries in window(arguments, phase, path, benches)
        for cell in wanted
        if any(store.key(_key(head, bench, query, cell)) not in done for query in queries)
    ]


def run(
    arguments: argparse.Namespace,
    phase: str,
    path: str,
    way: Way,
    work: Work,
    ends: float,
) -> bool:
    """Whether all was measured in time."""
    head = {"phase": phase, "model": arguments.model.name, "path": path}
    warm: set[str] = set()
    for bench, queries, cell in tqdm(work, desc=f"{path}, {phase}", unit="run", mininterval=5):
        if time.perf_counter() > ends:
            return False
        if isinstance(way, Together):
            rows = bench.run_together(way, queries, cell)
        else:
            [query] = queries
            if cell.rule not in warm:  # a first run of a rule is discarded
                bench.run(way, query, cell)
                warm.add(cell.rule)
            rows = [bench.run(way, query, cell)]
        store.write(arguments.out, arguments.shard[0], [head | row for row in rows])
    return True


def wait_for_calibration(
    arguments: argparse.Namespace, phases: list[str], path: str, subsets: int, ends: float
) -> None:
    """Until the rows of the other shards are there: they decide the rates."""
    expected = {
        phase: arguments.calibration * subsets * len(list(cells(arguments, phase, path)))
        for phase in phases
        if phase != "judge"
    }
    while time.perf_counter() < ends:
        rows = [row for row in store.read(arguments.out) if row["path"] == path]
        found = {phase: sum(row["phase"] == phase for row in rows) for phase in expected}
        if all(found[phase] >= number for phase, number in expected.items()):
            return
        time.sleep(1.0)


def _key(head: dict[str, Any], bench: Bench, query: int, cell: Cell) -> dict[str, Any]:
    beta1, beta2 = cell.betas
    named = {"rule": cell.rule, "budget": cell.budget, "lr": cell.lr}
    place = {"subset": bench.corpus.name, "query": query}
    return head | named | {"beta1": beta1, "beta2": beta2} | place


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"expected a number below N as i/N, got {text!r}")
    return int(number), int(of)


def _listed(names: Iterable[str]) -> str:
    return "".join(f'\n  "{name}"' for name in names)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ttft",
        description=__doc__,
        epilog=f"Rules:{_listed(RULES)}\n\nIdeas, which are rules, too:{_listed(IDEAS)}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    every = (*PHASES, "report")
    phases = ", ".join(every)
    parser.add_argument("phases", nargs="+", choices=every, metavar="PHASE", help=phases)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the rows; of a report also parquet",
    )
    parser.add_argument("--texts", type=Path, metavar="DIR", help="default: the standard library")
    parser.add_argument(
        "--subsets", nargs="+", metavar="NAME", help="folders of --texts; default: all"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=texts.OWN_MODEL,
        metavar="DIR",
        help="a folder or a name of the Hub; default: the model in bench/assets",
    )
    parser.add_argument(
        "--start", metavar="TOKEN", help="token before a text; default: the tokenizer's bos"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of a text at most; default: 1024",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default, help="default: cuda if there is one"
    )
    parser.add_argument(
        "--paths",
        nargs="+",
        choices=PATHS,
        default=["bf16"],
        metavar="PATH",
        help=f"{', '.join(PATHS)}; default: bf16",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=list(EVERY),
        metavar="RULE",
        help="names from the list below; default: those under Rules",
    )
    parser.add_argument(
        "--ideas",
        nargs="*",
        choices=list(IDEAS),
        default=list(IDEAS),
        metavar="IDEA",
        help="what explore tries; default: all",
    )
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[8, 16, 32],
        metavar="N",
        help="passes of a query; default: 8 16 32",
    )
    parser.add_argument(
        "--steps",
        type=float,
        nargs="+",
        metavar="RATE",
        help="what calibrate tries: learning rate times updates with one gradient; "
        "default: four,\nfive for adapters",
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=8,
        metavar="N",
        help="calibration queries of each subset; default: 8",
    )
    parser.add_argument(
        "--judged",
        type=int,
        default=40,
        metavar="N",
        help="judged queries of each subset; default: 40",
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=32,
        metavar="K",
        help="prompts at once on the path many; default: 32",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="i/N",
        help="measure part i of N, the first is 0; default: all",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        metavar="MINUTES",
        help="begin no run later; default: no limit",
    )
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="CSV",
        help="write the report's means here, as in bench/results",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    phases = [phase for phase in PHASES if phase in arguments.phases]
    if phases:
        measure(arguments, phases)
    if "report" in arguments.phases:
        rows = store.read(arguments.out)
        report.show(rows)
        if arguments.summary is not None:
            report.write_summary(rows, arguments.summary)


if __name__ == "__main__":
    main()
