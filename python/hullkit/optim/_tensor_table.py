# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors as the multi-tensor kernels take them, and the way to those kernels.

A list of T tensors is a table on its device; what changes from call to call, options and gradients'
addresses, is a record. `_record.py` has the layout of both. These kernels are not dispatcher
operators: handing six hundred tensors through the dispatcher takes longer than a step of a
124M-parameter model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..native.torch_private import raw_stream
from ._layouts import address
from ._record import BROKEN, HEAD, LIMIT, NO_LIMIT, NUM_OPTIONS, SEED, Options, TensorRow

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


def check_disjoint(name: str, tensors: Sequence[Tensor]) -> None:
    """Two programs must never write the same element."""
    if sharing_memory(tensors, [address(name, tensor) for tensor in tensors]) is not None:
        raise ValueError(
            f"{name}: expected tensors that share no memory, got two that do (a tied one is "
            "passed once)"
        )


class TensorTable:
    """T tensors of one device, their dtypes alike, as addresses.

    The memory behind the addresses must outlive every launch and every graph that captured one.
    """

    def __init__(self, rows: Sequence[TensorRow], device: torch.device, triton: bool) -> None:
        if _capturing(device):
            raise RuntimeError(
                "expected a first step on these tensors before the capture of a CUDA graph "
                "(it sets up state and tables), got none"
            )
        self.device = device
        self.triton = triton
        self.rows = list(rows)
        self.size = len(rows)
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
        # What the latest record holds, and the record: one attribute, for a signal's handler may
        # call between the setting of two.
        self._latest: tuple[Any, Tensor] = (None, torch.empty(0, device="cpu"))
        self.captured: list[Tensor] = []  # records that graphs read at every replay
        if triton:
            self.chunks = self.chunks_of(range(self.size))

    def set_no_longer_fresh(self) -> None:
        """After the first launch, which set every state."""
        self.table[:, TensorRow._fields.index("flags")].bitwise_and_(-2)

    def chunks_of(self, rows: range) -> Tensor:
        """[programs, 2] int32 on the device: row, and chunk of its tensor, of each program."""
        from ..triton_kernels.multi_tensor import CHUNK_SIZE

        counts = [-(-self.rows[row].numel // CHUNK_SIZE) for row in rows]
        tensors = np.repeat(np.arange(rows.start, rows.stop), counts)
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        chunks = np.stack([tensors, np.arange(len(tensors)) - firsts], axis=1)
        return torch.from_numpy(chunks.astype(np.int32)).to(self.device)

    def record(self, grads: list[int], options: Options, seed: int = 0) -> Tensor:
        """[HEAD + T] int64 on the device: options, a limit to num_steps beyond any, the seed and
        the gradients' addresses.

        Copied only when it changed. An option that lives on the device is NaN here, and written
        into the record by the caller, every time.
        """
        on_gpu = self.device.type == "cuda"
        stream = raw_stream(self.device) if on_gpu else None
        contents = (stream, grads, options, seed)
        known, record = self._latest
        if known == contents:
            return record
        size = HEAD + self.size
        host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        words = host.numpy()
        words[:NUM_OPTIONS].view(np.float64)[:] = options
        words[LIMIT], words[BROKEN], words[SEED] = NO_LIMIT, 0, seed
        words[HEAD:] = grads
        record = host.to(self.device, non_blocking=True)
        if _capturing(self.device):
            self.captured += [host, record]
            return record
        self._latest = (contents, record)
        return record


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
