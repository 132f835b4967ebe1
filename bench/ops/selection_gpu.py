# SPDX-License-Identifier: Apache-2.0
"""`make bench-gpu`: selection on a CUDA device, every case checked first.

`select` in float32 is checked against the CPU kernels, in bfloat16 by its residuals; `frank_wolfe`
against the naive loop, `lmo` against torch's products, and runs over a corpus by their residuals
and gaps, computed anew.

Times are of whole calls, by CUDA events, back to back; bandwidths are bytes of the pool over time,
against a device copy's bytes read and written over its time, in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import hullkit
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness.rows import append, timings

TOTAL, N, DIM = 50, 200, 1024
Case = tuple[str, str, str, str]  # operation, provider, dtype, shape
Bar = tuple[str, float, bool, str]  # what, its value, whether that meets the bar, the bar


def clustered(
    batch: int, n: int, d: int, spread: float, seed: int, device: str
) -> tuple[Tensor, Tensor]:
    """Unit vectors around a centre for each prompt, as neighbours in an embedding are."""
    generator = torch.Generator(device).manual_seed(seed)

    def around(*shape: int) -> Tensor:
        noise = torch.randn(*shape, d, generator=generator, device=device)
        return torch.nn.functional.normalize(centre[:, None] + spread * noise, dim=-1)

    centre = torch.randn(batch, d, generator=generator, device=device)
    return around(batch, n), around(batch, 1)[:, 0]


def naive(
    pool: Tensor, query: Tensor, max_support: int, max_iters: int = 250, tol: float = 1e-5
) -> Tensor:
    """Frank-Wolfe over a batch as one would write it in torch: every product anew in every step.

    It has to stop each prompt where the method does, or its answers would be others; it does not
    wait for the device to find out whether all have stopped, which some never do.
    """
    rows = torch.arange(len(pool), device=pool.device)
    best = torch.bmm(pool, query[:, :, None])[:, :, 0].argmax(1)
    weights = torch.zeros(pool.shape[:2], device=pool.device)
    weights[rows, best] = 1.0
    touched = weights > 0
    iterate = pool[rows, best].clone()
    running = touched.sum(1) < max_support
    for _ in range(max_iters):
        residual = query - iterate
        running &= torch.linalg.vector_norm(residual, dim=1) >= tol
        best = torch.bmm(pool, residual[:, :, None])[:, :, 0].argmax(1)
        direction = pool[rows, best] - iterate
        length = (direction * direction).sum(1)
        running &= length >= 1e-12
        step = ((residual * direction).sum(1) / length).clamp(0.0, 1.0)
        step = torch.where(running, step, 0.0)[:, None]
        weights *= 1.0 - step
        weights[rows, best] += step[:, 0]
        touched[rows, best] |= running
        iterate += step * direction
        running &= touched.sum(1) < max_support
    return weights


def timed(call: Callable[[], Any], rounds: int) -> list[float]:
    """ms of each of `rounds` calls."""
    for _ in range(2):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def agreement(device: hullkit.Multiset, oracle: hullkit.Multiset) -> Tensor:
    """Whether support and counts of each prompt are the oracle's."""
    same = (device.indices.cpu() == oracle.indices) & (device.counts.cpu() == oracle.counts)
    return same.all(1)


def dense(result: Any) -> Tensor:
    """Weights by candidate."""
    weights = torch.zeros(len(result.indices), N + 1, device=result.weights.device)
    places = result.indices.where(result.indices >= 0, N)
    return weights.scatter(1, places, result.weights.float())[:, :N]


def check_many(pools: int) -> list[tuple[str, int, int]]:
    """(dtype, equal, of) over clustered pools of several sizes and spreads, against float64."""
    equal = {torch.float32: 0, torch.float64: 0}
    done = 0
    sizes = [
        (n, d, spread)
        for n, d in ((200, 384), (200, 1024), (100, 768))
        for spread in (0.3, 0.7, 2.0)
    ]
    for seed, (n, d, spread) in enumerate(sizes):
        count = -(-pools // len(sizes))
        pool, query = clustered(count, n, d, spread, seed, "cuda")
        oracle = hullkit.select(pool.cpu().double(), query.cpu().double(), TOTAL)
        done += count
        for dtype in equal:
            chosen = hullkit.select(pool.to(dtype), query.to(dtype), TOTAL)
            equal[dtype] += int(agreement(chosen, oracle).sum())
    return [(str(dtype).removeprefix("torch."), number, done) for dtype, number in equal.items()]


def select_cases() -> dict[Case, list[float]]:
    times = {}
    for batch in (1, 64, 512, 2048):
        pool, query = clustered(batch, N, DIM, 0.7, batch, "cuda")
        chosen = hullkit.select(pool, query, TOTAL)
        some = slice(0, 64)
        oracle = hullkit.select(pool[some].cpu(), query[some].cpu(), TOTAL)
        first = hullkit.Multiset(
            chosen.indices[some], chosen.counts[some], chosen.rows[some], chosen.result
        )
        wrong = int((~agreement(first, oracle)).sum())
        assert wrong <= len(oracle.counts) // 64, (
            f"{wrong} of {len(oracle.counts)} prompts differ from the CPU's"
        )
        assert (chosen.counts.sum(1) == TOTAL).all()
        shape = f"clustered B={batch} n={N} d={DIM} total={TOTAL}"
        times["select", "hullkit", "float32", shape] = timed(
            partial(hullkit.select, pool, query, TOTAL), 30
        )
        if batch in (1, 512):
            times["frank_wolfe", "hullkit", "float32", shape] = timed(
                partial(hullkit.frank_wolfe, pool, query, max_support=TOTAL), 30
            )
            apart = (naive(pool, query, TOTAL) - dense(chosen.result)).abs().amax(1)
            assert (apart < 1e-4).float().mean() >= 0.98, "the naive loop's answers are others"
            times["frank_wolfe", "naive batched torch", "float32", shape] = timed(
                partial(naive, pool, query, TOTAL), 3
            )
        half, prompts = pool.bfloat16(), query.bfloat16()
        chosen = hullkit.select(half, prompts, TOTAL)
        oracle = hullkit.select(half[some].cpu().double(), prompts[some].cpu().double(), TOTAL)
        assert (chosen.counts.sum(1) == TOTAL).all()
        one, other = (found.result.residual_norm.cpu().double() for found in (chosen, oracle))
        torch.testing.assert_close(one[some], other, rtol=1e-3, atol=1e-4)
        times["select", "hullkit", "bfloat16", shape] = timed(
            partial(hullkit.select, half, prompts, TOTAL), 30
        )
    return times


def lmo_cases() -> dict[Case, list[float]]:
    times = {}
    size, d = 10**6, 384
    for dtype in (torch.float32, torch.bfloat16):
        pool = torch.nn.functional.normalize(torch.randn(size, d, device="cuda"), dim=1).to(dtype)
        target = torch.empty_like(pool)
        name = str(dtype).removeprefix("torch.")
        times["copy", "torch", name, f"M={size} d={d}"] = timed(partial(target.copy_, pool), 20)
        for batch in (1, 4, 16):
            direction = torch.randn(batch, d, device="cuda").to(dtype)
            answer = hullkit.lmo(pool, direction)
            products = (pool.float() @ direction.float().T).double()
            picked = products.gather(0, answer.index[None])[0]
            assert (picked - products.min(0).values).abs().max() < 1e-4
            shape = f"M={size} d={d} B={batch}"
            times["lmo", "hullkit", name, shape] = timed(partial(hullkit.lmo, pool, direction), 20)
    return times


def corpus_cases(lmo_times: dict[Case, list[float]]) -> tuple[dict[Case, list[float]], list[Bar]]:
    """Over a whole corpus; bars: against as many passes of `lmo` as its longest run made."""
    times, bars = {}, []
    size, d, batch = 10**6, 384, 16
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator("cuda").manual_seed(0)
        pool = torch.randn(size, d, generator=generator, device="cuda")
        query = torch.randn(batch, d, generator=generator, device="cuda")
        pool = torch.nn.functional.normalize(pool, dim=1).to(dtype)
        query = torch.nn.functional.normalize(query, dim=1).to(dtype)
        chosen = hullkit.select(pool, query, TOTAL)
        result = chosen.result
        assert isinstance(result, hullkit.FrankWolfeResult)
        assert (chosen.counts.sum(1) == TOTAL).all()
        rows = pool[result.indices.clamp_min(0)].double()
        residual = query.double() - torch.einsum("bs,bsd->bd", result.weights, rows)
        torch.testing.assert_close(result.residual_norm, residual.norm(dim=1))
        products = torch.cat([part.double() @ residual.T for part in pool.split(2**16)])
        gap = products.amax(0) - (residual * (query.double() - residual)).sum(1)
        torch.testing.assert_close(result.dual_gap, gap, rtol=0.0, atol=1e-5)
        name = str(dtype).removeprefix("torch.")
        shape = f"M={size} d={d} B={batch} total={TOTAL}"
        calls = {
            "frank_wolfe": partial(hullkit.frank_wolfe, pool, query, max_support=TOTAL),
            "select": partial(hullkit.select, pool, query, TOTAL),
        }
        passes = int(result.num_iters.max()) + 2
        one = statistics.median(lmo_times["lmo", "hullkit", name, f"M={size} d={d} B={batch}"])
        for op, call in calls.items():
            times[op, "hullkit", name, shape] = timed(call, 5)
            ratio = statistics.median(times[op, "hullkit", name, shape]) / (passes * one)
            label = f"{op} {name}, whole corpus, times the sum of its {passes} passes"
            bars.append((label, ratio, ratio <= 2, "<= 2"))
    return times, bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--pools", type=int, default=10_000, help="clustered pools to compare")
    arguments = parser.parse_args()
    console = Console(width=120)
    device = torch.cuda.get_device_name()
    lmo_times = lmo_cases()
    corpus_times, corpus_bars = corpus_cases(lmo_times)
    times = {**select_cases(), **lmo_times, **corpus_times}
    median = {key: statistics.median(values) for key, values in times.items()}
    table = Table("operation", "provider", "dtype", "shape", "p50 ms", title=f"on {device}")
    for case, value in median.items():
        table.add_row(*case, f"{value:.4f}")
    console.print(table)
    shape = f"clustered B={{}} n={N} d={DIM} total={TOTAL}"
    at = {
        batch: median["select", "hullkit", "float32", shape.format(batch)]
        for batch in (1, 512, 2048)
    }
    against = median["frank_wolfe", "naive batched torch", "float32", shape.format(512)] / at[512]
    bars = [
        ("select B=512, ms", at[512], at[512] <= 1.0, "<= 1.0"),
        ("select B=512, times naive torch", against, against >= 100, ">= 100"),
        ("select B=1, ms", at[1], at[1] <= 0.25, "<= 0.25"),
        ("select B=2048 / B=512", at[2048] / at[512], at[2048] <= 4 * at[512], "<= 4"),
    ]
    for (op, _, dtype, where), value in median.items():
        if op == "lmo":
            share = median["copy", "torch", dtype, where.rpartition(" ")[0]] / 2 / value
            bars.append((f"lmo {dtype} {where}, of copy bandwidth", share, share >= 0.8, ">= 0.8"))
    bars += corpus_bars
    for name, equal, of in check_many(arguments.pools):
        wanted = 1.0 if name == "float64" else 0.995
        bars.append(
            (
                f"equal to the oracle, {name}, {of} pools",
                equal / of,
                equal / of >= wanted,
                f">= {wanted}",
            )
        )
    for name, value, met, bar in bars:
        console.print(f"{'met' if met else 'MISSED'}: {name}: {value:.4f} (bar {bar})")
    if arguments.out is not None:
        append(arguments.out, timings(times, "cuda"))


if __name__ == "__main__":
    main()
