# SPDX-License-Identifier: Apache-2.0
"""Pools from a corpus that stays on disk: `python -m bench.ops.large_corpora`.

Synthetic vectors in clusters: an IVF index and the vectors themselves, both files. A fresh process
maps them, searches a pool for a prompt and selects from it. Its memory and time are the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from hullkit.interop.faiss import select
from rich.console import Console
from tqdm import tqdm

from bench.harness.rows import append, row

D, PROBES, N, TOTAL, PROMPTS = 64, 8, 200, 50, 20
BLOCK = 250_000


def lists(count: int) -> int:
    """About the root of the number of vectors: a search compares as many lists as vectors."""
    return 1 << round(math.log2(count) / 2 + 0.5)


def vectors(count: int, seed: int) -> Any:
    """Unit vectors around one of 5,000 centres."""
    centres = np.random.default_rng(0).normal(size=(5000, D)).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(len(centres), size=count)]
    rows += 0.5 * rng.standard_normal((count, D), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(folder: Path, count: int) -> None:
    index = faiss.index_factory(D, f"IVF{lists(count)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 5  # the quality of the clusters is not the question
    index.train(vectors(min(count, 50 * lists(count)), 1))
    mapped = np.lib.format.open_memmap(
        folder / "vectors.npy", mode="w+", dtype=np.float32, shape=(count, D)
    )
    for begin in tqdm(range(0, count, BLOCK), desc=f"{count:,} vectors"):
        block = vectors(min(BLOCK, count - begin), 2 + begin)
        mapped[begin : begin + len(block)] = block
        index.add(block)
    mapped.flush()
    faiss.write_index(index, str(folder / "index"))


def resident() -> float:
    """MiB of this process, with the pages of mapped files that it has touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(folder: Path) -> None:
    """In a process of its own: prints times in ms and the growth of its memory in MiB."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    prompts = vectors(PROMPTS, 1_000_003)
    small = faiss.index_factory(D, "IVF1,Flat", faiss.METRIC_INNER_PRODUCT)
    small.train(prompts)
    small.add(prompts)
    select(small, prompts, 5, num_candidates=10)  # libraries are loaded
    before = resident()
    index = faiss.read_index(str(folder / "index"), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    index.nprobe = PROBES
    embeddings = np.load(folder / "vectors.npy", mmap_mode="r")
    opened, times, grown = resident() - before, [], []
    for prompt in prompts:
        began = time.perf_counter()
        chosen = select(index, prompt, TOTAL, num_candidates=N, embeddings=embeddings)
        times.append(1e3 * (time.perf_counter() - began))
        grown.append(resident() - before)
        assert int(chosen.counts.sum()) == TOTAL
    print(json.dumps({"times": sorted(times), "opened": opened, "grown": grown}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", nargs="+", type=int, default=[10**5, 10**6, 10**7])
    parser.add_argument("--folder", type=Path, help="where to put the files; default: temporary")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(arguments.measure)
        return
    console = Console(width=120)
    for count in arguments.vectors:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            write(folder, count)
            disk = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
            command = [sys.executable, "-m", "bench.ops.large_corpora", "--measure", name]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        times = found["times"]
        first, last = found["grown"][0], found["grown"][-1]
        console.print(
            f"{count:,} vectors, {disk:,.0f} MiB on disk: {times[len(times) // 2]:.2f} ms a "
            f"prompt; memory grew by {found['opened']:.0f} MiB on opening, {first:.0f} after one "
            f"prompt, {last:.0f} after {PROMPTS}"
        )
        if arguments.out is not None:
            found_row = row(
                "select from a corpus on disk", "hullkit, faiss IVF mapped",
                f"M={count} d={D} lists={lists(count)} probes={PROBES} n={N} total={TOTAL} "
                f"disk_mb={disk:.0f} opened_mb={found['opened']:.0f} one_prompt_mb={first:.0f} "
                f"prompts={PROMPTS}",
                "float32", times, threads=1, peak_mb=round(last),
            )  # fmt: skip
            append(arguments.out, [found_row])


if __name__ == "__main__":
    main()
