# SPDX-License-Identifier: Apache-2.0
"""Second half of `make bench-gpu`: SIFT on a CUDA device, checked against the CPU kernels first.

Rivals: a batched loop in torch that conditions whole kernels, and activeft, where it is installed,
one prompt after the other on the device (without faiss, and without the process that loads data).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from functools import partial
from pathlib import Path

import hullkit
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness.rows import append, timings
from bench.ops.selection_gpu import DIM, TOTAL, Bar, Case, N, clustered, timed

NOISE = 0.01


def naive(pool: Tensor, query: Tensor) -> Tensor:
    """SIFT over a batch as one would write it in torch: the kernel of all, conditioned on one
    candidate after the other."""
    points = torch.cat([pool, query[:, None]], 1)
    kernel = torch.bmm(points, points.transpose(1, 2))
    n, rows = pool.shape[1], torch.arange(len(pool), device=pool.device)
    order = []
    for _ in range(TOTAL):
        variances = kernel.diagonal(dim1=1, dim2=2)[:, :n]
        best = (kernel[:, n, :n].square() / (variances + NOISE)).argmax(1)
        column = kernel[rows, best]
        kernel = (
            kernel
            - column[:, :, None] * (column / (variances[rows, best] + NOISE)[:, None])[:, None]
        )
        order.append(best)
    return torch.stack(order, 1)


def activeft(pool: Tensor, query: Tensor) -> list[int]:
    from activeft import ActiveDataLoader
    from activeft.acquisition_functions.vtl import VTL
    from activeft.data import Dataset

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(pool)

        def __getitem__(self, i: int) -> Tensor:
            return pool[i]

    rule = VTL(target=query[None], num_workers=0, subsample=False, noise_std=NOISE**0.5)
    chosen, _ = ActiveDataLoader(Rows(), TOTAL, rule, torch.device("cuda")).next()
    return [int(i) for i in chosen]


def same_orders(one: Tensor, other: Tensor) -> float:
    return float((one.cpu() == other.cpu()).all(1).float().mean())


def cases(console: Console) -> tuple[dict[Case, list[float]], list[Bar]]:
    times: dict[Case, list[float]] = {}
    bars: list[Bar] = []
    for batch in (1, 64, 512):
        pool, query = clustered(batch, N, DIM, 0.7, batch, "cuda")
        shape = f"clustered B={batch} n={N} d={DIM} total={TOTAL}"
        for dtype in (torch.float32, torch.bfloat16):
            rows, prompts = pool.to(dtype), query.to(dtype)
            result = hullkit.sift(rows, prompts, TOTAL)
            # The device sums float32 products in float64; the CPU's answer to the same numbers.
            expected = hullkit.sift(rows[:64].cpu().double(), prompts[:64].cpu().double(), TOTAL)
            # Halves are summed in float32, and 1 / noise times that is left of it.
            within = 1e-5 if dtype is torch.float32 else 1e-3
            torch.testing.assert_close(
                result.variance[:64].cpu(), expected.variance, rtol=0.0, atol=within
            )
            equal = same_orders(result.order[:64], expected.order)
            least = 1.0 if dtype is torch.float32 else 0.8
            assert equal >= least, f"{equal} of the prompts' choices are the CPU's"
            name = str(dtype).removeprefix("torch.")
            call = partial(hullkit.sift, rows, prompts, TOTAL)
            times["sift", "hullkit", name, shape] = timed(call, 50)
        if batch == 1:
            continue
        order = hullkit.sift(pool, query, TOTAL).order
        agree = same_orders(naive(pool, query), order)
        console.print(f"naive loop, B={batch}: {agree:.3f} of the prompts have the same order")
        assert agree >= 0.9, "the naive loop's answers are others"
        times["sift", "naive batched torch", "float32", shape] = timed(
            partial(naive, pool, query), 5
        )
    ours = statistics.median(times["sift", "hullkit", "float32", shape])
    loop = statistics.median(times["sift", "naive batched torch", "float32", shape])
    console.print(f"B=512: {loop / ours:.1f} times naive torch; {1e3 * ours / 512:.3f} us a prompt")
    if not all(map(importlib.util.find_spec, ("activeft", "faiss"))):
        console.print("activeft (or faiss, which it imports) is not installed: no row of it")
        return times, bars
    on_host = (pool[0].cpu(), query[0].cpu())
    assert activeft(*on_host)[:10] == order[0, :10].tolist(), "activeft chooses others"
    one = f"clustered B=1 n={N} d={DIM} total={TOTAL}"
    times["sift", "activeft", "float32", one] = timed(partial(activeft, *on_host), 10)
    ratio = statistics.median(times["sift", "activeft", "float32", one]) / (ours / 512)
    bars.append(("sift B=512, times activeft a prompt", ratio, ratio >= 1000, ">= 1000"))
    return times, bars


def check_many(pools: int) -> list[Bar]:
    """Order of choice against float64 on the CPU, over clustered pools of several kinds."""
    equal: dict[torch.dtype, list[float]] = {torch.float32: [], torch.float64: []}
    sizes = [(n, d, spread) for n, d in ((200, 384), (100, 768)) for spread in (0.3, 0.7, 2.0)]
    for seed, (n, d, spread) in enumerate(sizes):
        pool, query = clustered(-(-pools // len(sizes)), n, d, spread, seed, "cuda")
        oracle = hullkit.sift(pool.cpu().double(), query.cpu().double(), TOTAL)
        for dtype in equal:
            chosen = hullkit.sift(pool.to(dtype), query.to(dtype), TOTAL)
            equal[dtype].append(same_orders(chosen.order, oracle.order))
    wanted = {torch.float32: 0.995, torch.float64: 1.0}
    return [
        (f"sift equal to the CPU's in float64, {dtype}", share, share >= wanted[dtype], "")
        for dtype, share in ((dtype, statistics.mean(shares)) for dtype, shares in equal.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--pools", type=int, default=3000, help="clustered pools to compare")
    arguments = parser.parse_args()
    console = Console(width=120)
    device = torch.cuda.get_device_name()
    times, bars = cases(console)
    table = Table("operation", "provider", "dtype", "shape", "p50 ms", title=f"on {device}")
    for case, values in times.items():
        table.add_row(*case, f"{statistics.median(values):.4f}")
    console.print(table)
    for what, value, met, bar in (*bars, *check_many(arguments.pools)):
        console.print(f"{'met' if met else 'MISSED'}: {what}: {value:.4f} {bar and f'(bar {bar})'}")
    if arguments.out is not None:
        append(arguments.out, timings(times, "cuda"))


if __name__ == "__main__":
    main()
