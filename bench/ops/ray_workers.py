# SPDX-License-Identifier: Apache-2.0
"""One and two Ray workers on this machine, and a driver that is killed: `python -m
bench.ops.ray_workers`.

The embedded model is adapted to 100 prompts. Before the times count, all rows must be there once
and equal those of one process without Ray.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hullkit
import pyarrow.parquet as pq
import torch
from hullkit.interop.ray import AdaptRows, Setup, unfinished
from rich.console import Console

from bench.harness.rows import ROOT, append, row

MODULES = ("argparse", "ast", "bisect", "calendar", "csv", "enum", "functools", "heapq")
MODULES += ("inspect", "queue", "random", "shutil", "tarfile", "textwrap", "typing", "zipfile")
PROMPTS, BLOCK = 100, 5


def texts() -> tuple[list[str], list[str], Any]:
    """Prompts, the corpus, and the embedding of the examples."""
    sys.path.insert(0, str(ROOT / "examples"))
    from passages import embed, passages

    found = passages(*MODULES)
    return found[:PROMPTS], found[PROMPTS:], embed


def setup() -> Setup:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "bench" / "assets" / "pybytes").float()
    prompts, corpus, embed = texts()
    pool = torch.from_numpy(embed(corpus))

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(list(text.encode()))

    def choose(block: Any) -> Any:
        queries = torch.from_numpy(embed([prompts[i] for i in block["id"].tolist()]))
        chosen = hullkit.select(pool, queries, total=10)
        return [
            ([tokens(corpus[row]) for row in rows[counts > 0]], counts[counts > 0])
            for rows, counts in zip(chosen.rows, chosen.counts, strict=True)
        ]

    def use(model: Any, row: Any) -> dict[str, Any]:
        ids = tokens(prompts[row["id"]])
        return {"bits_per_byte": hullkit.bits_per_byte(model, ids, len(ids) - 1)}

    return Setup(hullkit.TestTimeFinetuner(model, lr=1e-4), choose, use)


def run(folder: str, workers: int) -> None:
    import ray
    import ray.data

    environment = {"PYTHONPATH": str(ROOT)}
    ray.init(
        num_cpus=2, include_dashboard=False, logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = unfinished(ray.data.from_items([{"id": i} for i in range(PROMPTS)]), folder, "id")
    began = time.perf_counter()
    rows.map_batches(
        AdaptRows, fn_constructor_args=[setup, ["id"]], batch_size=BLOCK, num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=workers),
    ).write_parquet(folder)  # fmt: skip
    print(f"seconds {time.perf_counter() - began}")
    ray.shutdown()


def results(folder: str) -> dict[int, float]:
    rows = [
        row for path in Path(folder).glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(row["id"] for row in rows) == [*range(PROMPTS)], (
        "a row is missing, or there twice"
    )
    return {row["id"]: row["bits_per_byte"] for row in rows}


def driver(folder: str, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.ops.ray_workers", "--run", folder]
    return subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        run(arguments.run, arguments.workers)
        return
    import numpy as np

    block = {"id": np.arange(PROMPTS)}
    alone = AdaptRows(setup, ["id"])(block).to_pylist()
    wanted = {row["id"]: row["bits_per_byte"] for row in alone}
    with tempfile.TemporaryDirectory() as folder:
        killed = driver(folder, 2)
        while not list(Path(folder).glob("*.parquet")):
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        time.sleep(5)  # its workers notice
        again = driver(folder, 2)
        again.wait()
        assert results(folder) == wanted, "after a kill"
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for workers, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                printed, _ = driver(folder, workers).communicate()
                times.append(float(printed.split("seconds")[1]))
                assert results(folder) == wanted, f"{workers} workers"
    console, medians = Console(width=100), {}
    for workers, times in seconds.items():
        found = row(
            "many prompts by Ray", f"hullkit, {workers} workers",
            f"pybytes prompts={PROMPTS} updates=10", "float32", times, unit="s", threads=1,
        )  # fmt: skip
        medians[workers] = found["p50"]
        console.print(f"{workers} workers: {medians[workers]:.1f} s")
        if arguments.out is not None:
            append(arguments.out, [found])
    ratio = medians[1] / medians[2]
    console.print(f"{'met' if ratio >= 1.6 else 'MISSED'}: two workers {ratio:.2f}x one (bar 1.6x)")


if __name__ == "__main__":
    main()
