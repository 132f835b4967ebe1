# SPDX-License-Identifier: Apache-2.0
"""What all rooms ask of tensors: dtypes, the way to the kernels, and how elements lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)


def check_backend(backend: str | None) -> None:
    if backend not in (None, "triton"):
        raise ValueError(f"backend: expected None or 'triton', got {backend!r}")


def uses_triton(name: str, device: torch.device, backend: str | None) -> bool:
    """CUDA tensors go to the Triton kernels, CPU tensors to the C++ core.

    backend="triton" sends CPU tensors to Triton as well, for its interpreter.
    """
    check_backend(backend)
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"{name}: expected CPU or CUDA tensors, got device {device}")
    return backend == "triton" or device.type == "cuda"


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their stretch of memory: contiguous, but for the order of axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether element i in memory is the same element of both, and not its negative."""
    if tensor.shape != other.shape or tensor.is_neg() or other.is_neg():
        return False
    return tensor.stride() == other.stride() or all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    )


def sharing_memory(tensors: Sequence[Tensor], addresses: Sequence[int]) -> tuple[int, int] | None:
    """The places of two tensors that share memory; None if there are none."""
    stretches = sorted(
        (str(tensor.device), at, at + tensor.numel() * tensor.element_size(), place)
        for place, (tensor, at) in enumerate(zip(tensors, addresses, strict=True))
        if tensor.numel()
    )
    for (device, _, end, place), (next_device, begin, _, other) in pairwise(stretches):
        if device == next_device and begin < end:
            return place, other
    return None
