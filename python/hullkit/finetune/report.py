"""What one query took."""

from __future__ import annotations

import resource
import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class PhaseSeconds(NamedTuple):
    """Seconds of a query by phase, on a CUDA device as its stream spends them."""

    select: float | None  # as told to `adapted`
    prepare: float  # the snapshot, and what had to be recorded or compiled
    passes: float  # with the updates, where these run beside them
    updates: float | None  # None: beside the passes
    restore: float | None  # None until the block is left


class AdaptReport(NamedTuple):
    """What one query took: updates, passes, and the loss (usually nats per token) of each pass."""

    num_updates: int
    num_passes: int
    losses: tuple[float, ...]
    seconds: PhaseSeconds
    peak_memory: int  # bytes: what torch's allocator holds of the device; of a CPU, the process
    path: str  # "captured": passes are replayed CUDA graphs; or "eager"
    reason: str | None  # why not captured
    # The methods and functions that passes replaced while they ran, by name, sorted:
    # "package.Class.forward" or "module.function".
    fused: tuple[str, ...]


class Clock:
    """Laps by name, without waiting for the device until they are asked for."""

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
        """What happened since the last lap was `name`."""
        self._moments.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Sums by name. Waits for the device."""
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
        return torch.cuda.memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
