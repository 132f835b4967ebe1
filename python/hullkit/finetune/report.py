# SPDX-License-Identifier: Apache-2.0
"""The report of one query: updates, passes, losses, time and memory."""

from __future__ import annotations

import resource
import sys
import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class PhaseSeconds(NamedTuple):
    """Seconds of a query by phase; on a CUDA device, the time that its stream spends.

    Attributes:
        select: what `adapted` was told; None if nothing.
        prepare: the snapshot, recording and compilation.
        passes: forward and backward passes; captured ones with their updates, which run beside
            them.
        updates: the updates; None for captured passes.
        restore: putting the base weights back; None until the block is left.

    >>> import hullkit, torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> hullkit.TestTimeFinetuner(model).adapt_([torch.tensor([1, 2])], [1]).seconds._fields
    ('select', 'prepare', 'passes', 'updates', 'restore')
    """

    select: float | None
    prepare: float
    passes: float
    updates: float | None
    restore: float | None


class AdaptReport(NamedTuple):
    """The report of one query.

    Attributes:
        num_updates: Adam updates made. A pass that leaves no gradient, as hooks of yours took all,
            makes none.
        num_passes: forward and backward passes made.
        losses: the loss of each pass, usually in nats per token.
        seconds: time by phase: `select` (as told to `adapted`), `prepare`, `passes`, `updates` and
            `restore`. `updates` is None where they run beside the passes, `restore` is None until
            the block is left.
        peak_memory: bytes; the most that torch's allocator has held of a CUDA device, else the peak
            of the process.
        path: "captured" if passes were replayed CUDA graphs, else "eager".
        reason: why passes were not captured; None if they were.
        fused: the model's methods and functions that a pass replaced while it lasted, sorted by
            name: "package.Class.forward" or "module.function". Empty on a CPU but for the
            checkpointing of layers, and for a model of which a part is compiled.
        activations: "recompute" if a pass ran layers again in its backward half, else "keep".

    >>> import hullkit, torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> report = hullkit.TestTimeFinetuner(model).adapt_([torch.tensor([1, 2, 3])], [3])
    >>> report.num_updates, report.num_passes, report.reason, report.fused
    (3, 2, 'device cpu', ())
    """

    num_updates: int
    num_passes: int
    losses: tuple[float, ...]
    seconds: PhaseSeconds
    peak_memory: int
    path: str
    reason: str | None
    fused: tuple[str, ...]
    activations: str


class Clock:
    """A stopwatch with named laps. It waits for the device only when it is read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moments: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def lap(self, name: str) -> None:
        """Ends a lap: the time since the last one belongs to `name`."""
        self._moments.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """The seconds of each name. Waits for the device."""
        if self.device.type == "cuda":
            self._moments[-1][1].synchronize()
        sums: dict[str, float] = {}
        for (_, begin), (name, end) in pairwise(self._moments):
            cuda = self.device.type == "cuda"
            took = begin.elapsed_time(end) / 1e3 if cuda else end - begin
            sums[name] = sums.get(name, 0.0) + took
        return sums


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes
