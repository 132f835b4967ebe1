# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the CUDA kernels: problems, and comparisons of results by field."""

from __future__ import annotations

from typing import Any

import torch
from hullkit.finetune.capture_memory import CaptureMemory
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def problem(batch: int, n: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clustered unit vectors, and queries near them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, 1, d, generator=generator)
    pool = centres + 0.7 * torch.randn(batch, n, d, generator=generator)
    query = centres[:, 0] + 0.7 * torch.randn(batch, d, generator=generator)
    unit = torch.nn.functional.normalize
    return unit(pool, dim=-1).to(dtype), unit(query, dim=-1).to(dtype)


def behind_a_slow_producer(call: Any, *source: Tensor) -> Any:
    """call(*inputs) on a stream of its own, where its inputs are written long after the launch."""
    inputs = [torch.zeros_like(tensor) for tensor in source]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, tensor in zip(inputs, source, strict=True):
            target.copy_(tensor)
        result = call(*inputs)
    stream.synchronize()
    return result


def to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [to(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def to_entry(value: Any, b: Any) -> Any:
    if value is None:  # what a method has nothing to say of
        return None
    return type(value)(*(part[b] for part in value)) if isinstance(value, tuple) else value[b]


def assert_same(actual: Any, expected: Any, tolerance: float, name: str = "") -> None:
    """Integers equal, numbers within tolerance."""
    if expected is None:
        assert actual is None, name
    elif isinstance(expected, tuple):
        for field, a, e in zip(type(expected)._fields, actual, expected, strict=True):
            assert_same(a, e, tolerance, f"{name}.{field}")
    elif expected.dtype is torch.int64:
        assert torch.equal(actual.cpu(), expected), name
    else:
        torch.testing.assert_close(actual.cpu(), expected, rtol=0.0, atol=tolerance, msg=name)


def equal_bits(first: Any, second: Any) -> bool:
    if isinstance(first, tuple):
        return all(map(equal_bits, first, second))
    return first is second is None or torch.equal(first, second)


def count_recordings(monkeypatch: Any) -> list[Any]:
    """A list that gets an entry with every CUDA graph that a tuner or batch records from now on."""
    record, recorded = CaptureMemory.record, []

    def counted(*given: Any) -> Any:
        recorded.append(None)
        return record(*given)

    monkeypatch.setattr(CaptureMemory, "record", counted)
    return recorded
