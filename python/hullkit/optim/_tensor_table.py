# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors as the multi-tensor kernels take them, and the way to those kernels.

A list of T tensors is a table on its device; what changes from call to call, options and gradients'
addresses, is a record. `_record.py` has the layout of both. These kernels are not dispatcher
operators: handing six hundred tensors through the dispatcher takes longer than a step of a
124M-parameter model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._tensors import sharing_memory
from ..native.torch_private import raw_stream
from ._layouts import address
from ._record import BROKEN, HEAD, LIMIT, NO_LIMIT, NUM_OPTIONS, SEED, Options, TensorRow


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
