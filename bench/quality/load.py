# SPDX-License-Identifier: Apache-2.0
"""Long use: the same work again and again, and what must not change meanwhile.

Texts and problems come round again, so that their results can be compared bit for bit with those
of the first time. Everything that a run writes down has its memory from the start.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hullkit
import numpy as np
import torch
from torch import Tensor, nn

from bench.harness.texts import OWN_MODEL, language_model
from bench.ops import model_sizes
from bench.ops.selection_gpu import DIM, TOTAL, N, clustered

WARM_UP = 50  # until the allocators have what they will use
TEXTS = 16  # which come round again
SAMPLES = 1000  # of the memory, about

Figures = list[dict[str, Any]]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def device_bytes() -> int:
    """What all of the device's allocators hold, not torch's alone."""
    free, whole = torch.cuda.mem_get_info()
    return whole - free


class Watch:
    """Rounds with their times and memory, until the last of them or Ctrl-C."""

    def __init__(self, count: int, cuda: bool = False) -> None:
        self.count, self.cuda = count, cuda
        self.done = 0
        self.every = max(1, count // SAMPLES)
        self._times = np.zeros(count)
        self._memory = np.zeros((count // self.every + 1, 2), dtype=np.int64)
        self._stopped = False

    def rounds(self) -> Iterator[int]:
        """Numbers of rounds. A round is what the caller does with one."""
        before = signal.signal(signal.SIGINT, self._stop)
        began = time.monotonic()
        try:
            while self.done < self.count and not self._stopped:
                if self.cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                yield self.done
                if self.cuda:
                    torch.cuda.synchronize()
                self._times[self.done] = time.perf_counter() - start
                if self.done % self.every == 0:
                    sample = resident_bytes(), device_bytes() if self.cuda else 0
                    self._memory[self.done // self.every] = sample
                self.done += 1
                if self.done % (10 * self.every) == 0:
                    seconds = time.monotonic() - began
                    print(f"{self.done} rounds, {seconds:.0f} s, {sample} bytes", flush=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def _stop(self, *_: object) -> None:
        self._stopped = True

    def figures(self) -> Figures:
        if self.done < 4 * WARM_UP:
            raise RuntimeError(f"expected at least {4 * WARM_UP} rounds, got {self.done}")
        p50, p99 = np.quantile(self._times[WARM_UP : self.done], [0.5, 0.99]) * 1e3
        memory = self._memory[-(-WARM_UP // self.every) : (self.done - 1) // self.every + 1]
        early, late = np.array_split(memory, 2)
        grown = late.max(0) - early.max(0)
        names = ["bytes grown", "bytes grown on the device"][: 1 + self.cuda]
        found: Figures = [
            {"figure": "p50", "value": round(float(p50), 3), "unit": "ms"},
            {"figure": "p99", "value": round(float(p99), 3), "unit": "ms"},
            *(
                {"figure": n, "value": int(v), "unit": "bytes"}
                for n, v in zip(names, grown, strict=False)
            ),
        ]
        return found


def digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().contiguous().cpu().view(torch.uint8)
        state.update(name.encode() + raw.numpy().tobytes())
    return state.hexdigest()


def _adapt_again(
    model: nn.Module, tokens: int, vocabulary: int, counts: list[int], watch: Watch
) -> Figures:
    """Adaptations to one short text each; the block looks at the weights that it finds."""
    largest = max((p for p in model.parameters() if p.requires_grad), key=Tensor.numel)
    tuner = hullkit.TestTimeFinetuner(model, lr=1e-4)
    device = largest.device
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (tokens,), generator=generator) for _ in range(TEXTS)]
    # float64 sums of float32 numbers: other weights have another sum, but for rare accidents.
    sums = torch.zeros(watch.count, dtype=torch.float64, device=device)
    before = digest(model)
    for i in watch.rounds():
        with tuner.adapted([texts[i % TEXTS]], counts):
            sums[i] = largest.detach().sum(dtype=torch.float64)
    report = tuner.last_report
    assert report is not None
    print(f"path {report.path}, updates {report.num_updates}", flush=True)
    seen = sums[: watch.done]
    differing = int((seen[TEXTS:] != seen[:-TEXTS]).sum())
    count = {"count": watch.done}
    figures = [
        *watch.figures(),
        {"figure": "base weights changed", "value": int(digest(model) != before), "unit": "models"},
        {"figure": "texts with other weights", "value": differing, "unit": "texts"},
    ]
    return [row | count for row in figures]


def adaptations(count: int, trained: str) -> Figures:
    """Of the embedded model, on the CPU: `trained` is "all" or "last", a layer."""
    model: Any = language_model(OWN_MODEL, torch.device("cpu"))
    if trained == "last":
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
    return _adapt_again(model, 8, model.config.vocab_size, [1], Watch(count))


def gpu_adaptations(count: int) -> Figures:
    """Of SmolLM2-135M's shape, all weights trained."""
    shape = model_sizes.SHAPES["smollm2"]
    model, _ = model_sizes.build(shape, model_sizes.CASES["float32"], torch.device("cuda"))
    return _adapt_again(model, 64, shape.vocabulary, [1], Watch(count, cuda=True))


def gpu_selections(count: int) -> Figures:
    """`count` is of prompts, which come in batches of 512."""
    batch, sets = 512, 4
    problems = [clustered(batch, N, DIM, 0.5, seed, "cuda") for seed in range(sets)]
    first = [hullkit.select(*problem, TOTAL) for problem in problems]
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    watch = Watch(-(-count // batch), cuda=True)
    for i in watch.rounds():
        found, expected = hullkit.select(*problems[i % sets], TOTAL), first[i % sets]
        differing += _prompts_that_differ(found, expected)
    figures = [
        *watch.figures(),
        {"figure": "prompts with other results", "value": int(differing), "unit": "prompts"},
    ]
    return [row | {"count": watch.done * batch} for row in figures]


def _prompts_that_differ(found: Any, expected: Any) -> Tensor:
    """Of every part of a result, so that weights and residuals count as well as indices."""
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    unlike = [(a != b).reshape(len(a), -1).any(1) for a, b in pairs]
    return torch.stack(unlike).any(0).sum()


def _tensors(result: Any) -> list[Tensor]:
    parts = [_tensors(p) if isinstance(p, tuple) else [p] for p in result]
    return [p for p in itertools.chain(*parts) if isinstance(p, Tensor)]


def of_processes(files: list[Path]) -> list[dict[str, Any]]:
    """One row for each figure of runs side by side: the median of p50, the most of what may grow,
    the sum of what may go wrong."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault((row["check"], row["figure"]), []).append(row)
    merged = []
    for (_, figure), rows in found.items():
        values = [float(row["value"]) for row in rows]
        of = {"p50": statistics.median, "p99": max}.get(figure, max if "grown" in figure else sum)
        value = round(of(values), 3) if figure in ("p50", "p99") else int(of(values))
        command = re.sub(r" --out \S+", "", rows[0]["command"])
        if len(rows) > 1:
            command += f" ({len(rows)} processes)"
        count = sum(int(row["count"]) for row in rows)
        merged.append({**rows[0], "value": value, "count": count, "command": command})
    return merged
