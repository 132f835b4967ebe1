# SPDX-License-Identifier: Apache-2.0
"""Times of CUDA graphs: of several ways to compute, so that launches cost all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.harness.rows import append, timings

REPEATS = 20  # of a graph, between two events


def graph_of(run: Callable[[], Any]) -> Any:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def milliseconds(graph: Any, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(REPEATS):
            graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / REPEATS)
    return times


def compare(
    op: str,
    dtype: str,
    shape: str,
    ways: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    out: Path | None,
    parts: int = 1,
) -> None:
    """Prints all ways' times, each a share of one of `parts`; appends their rows to `out`."""
    times = {}
    for provider, run in ways.items():
        graph = graph_of(run)
        times[op, provider, dtype, shape] = [ms / parts for ms in milliseconds(graph, rounds)]
    medians = [sorted(values)[len(values) // 2] for values in times.values()]
    said = (
        f"{name} {ms:.4f} ms, {ms / medians[0]:.2f}x"
        for name, ms in zip(ways, medians, strict=True)
    )
    print(f"{shape}: {'; '.join(said)}", flush=True)
    if out is not None:
        append(out, timings(times, "cuda"))
