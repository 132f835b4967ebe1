# SPDX-License-Identifier: Apache-2.0
"""Branches of a CUDA graph: kernels that run beside others, which leave some of a GPU idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def beside(device: torch.device, work: Callable[[], None]) -> Iterator[None]:
    """Runs `work`; while a graph is captured, as a branch of it beside what the block launches.

    Both are done where the block ends. `work` must allocate nothing: the allocator gives memory of
    one stream to no other. Outside of a capture nothing is gained, and all goes to one stream.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        work()
        yield
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            work()
        yield
    finally:  # a capture must not end with streams apart
        current.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """There is one for all models: torch keeps memory for every stream."""
    return torch.cuda.Stream(device, priority=-1)
