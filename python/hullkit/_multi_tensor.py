"""Lists of tensors as the multi-tensor kernels take them, and the way to those kernels.

A list of T tensors is a table [T, 6] int64 on its device (see `triton_kernels/multi_tensor.py` and
`csrc/include/hullkit/tensor_table.h`); what changes from call to call, options and gradients'
addresses, is a record [13 + T] int64. These kernels are not dispatcher operators: handing six
hundred tensors through the dispatcher takes longer than a step of a 124M-parameter model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _native
from ._layouts import address

NUM_OPTIONS = 10
LIMIT = 10  # the word of a record that bounds num_steps: a captured launch has its own for good
BROKEN = 11  # the word that Adam's kernel sets at a gradient that is not finite
SEED = 12  # of stochastic rounding
HEAD = 13  # words before the gradients' addresses
FACTOR = 9  # the option that clipping by global norm writes, on the device
_ROWS = 128  # of a table, for one program of Adam's coefficients
_NO_LIMIT = 2**31 - 1
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)


def uses_triton(name: str, device: torch.device, backend: str | None) -> bool:
    """CUDA tensors go to the Triton kernels, CPU tensors to the C++ core.

    backend="triton" sends CPU tensors to Triton as well, for its interpreter.
    """
    if backend not in (None, "triton"):
        raise ValueError(f"backend: expected None or 'triton', got {backend!r}")
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


def check_disjoint(name: str, tensors: Sequence[Tensor]) -> None:
    """Two programs must never write the same element."""
    placed = [(str(t.device), address(name, t), t.numel() * t.element_size()) for t in tensors]
    stretches = sorted((device, at, at + size) for device, at, size in placed if size)
    for (device, _, end), (next_device, begin, _) in pairwise(stretches):
        if device == next_device and begin < end:
            raise ValueError(
                f"{name}: expected tensors that share no memory, got two that do (a tied one is "
                "passed once)"
            )


class TensorTable:
    """T tensors of one device, their dtypes alike, as addresses.

    rows: one (address, state address, state address, step address, numel, flags) for each tensor.
    The memory behind the addresses must outlive every launch and every graph that captured one.
    """

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device, triton: bool) -> None:
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
        self._last: tuple[Any, ...] = ()
        self._record = torch.empty(0, device="cpu")
        self.captured: list[Tensor] = []  # records that graphs read at every replay
        if triton:
            self.chunks = self.chunks_of(range(self.size))

    def chunks_of(self, rows: range) -> Tensor:
        """[programs, 2] int32 on the device: row, and chunk of its tensor, of each program."""
        from .triton_kernels.multi_tensor import CHUNK_SIZE

        counts = [-(-self.rows[row][4] // CHUNK_SIZE) for row in rows]
        tensors = np.repeat(np.arange(rows.start, rows.stop), counts)
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        chunks = np.stack([tensors, np.arange(len(tensors)) - firsts], axis=1)
        return torch.from_numpy(chunks.astype(np.int32)).to(self.device)

    def record(self, grads: list[int], options: tuple[float, ...], seed: int = 0) -> Tensor:
        """[13 + T] int64 on the device: the options' bits, a limit to num_steps beyond any, a word
        for kernels to write to, the seed, then the gradients' addresses.

        Copied only when it changed. An option that lives on the device is NaN here, and written
        into the record by the caller, every time.
        """
        on_gpu = self.device.type == "cuda"
        stream = raw_stream(self.device) if on_gpu else None
        if self._last == (stream, grads, options, seed):
            return self._record
        size = HEAD + self.size
        host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        words = host.numpy()
        words[:NUM_OPTIONS].view(np.float64)[:] = options
        words[LIMIT], words[BROKEN], words[SEED] = _NO_LIMIT, 0, seed
        words[HEAD:] = grads
        record = host.to(self.device, non_blocking=True)
        if _capturing(self.device):
            self.captured += [host, record]
            return record
        self._last, self._record = (stream, grads, options, seed), record
        return record


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def raw_stream(device: torch.device) -> int:
    """The stream that copies and kernels of a CUDA device go to now."""
    return torch._C._cuda_getCurrentRawStream(device.index)  # as torch's own compiled code does


# Kernels by what they were compiled for, with the constants among their arguments. Triton's own way
# to a launch works this out anew every time, and asks the driver about every pointer: that takes
# longer than all the rest of a step takes on the host.
_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def _launch(name: str, table: TensorTable, *arguments: Any, **constants: Any) -> None:
    """A program for every chunk. constants: torch dtypes and flags."""
    _run(name, table, len(table.chunks), *arguments, **constants)


def _run(name: str, table: TensorTable, programs: int, *arguments: Any, **constants: Any) -> None:
    """The constants decide on the types of all arguments, and are the kernel's last ones."""
    if programs == 0:
        return  # nothing but empty tensors
    device = table.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(name, table, programs, *arguments, **constants)
    key = (name, device, *constants.values())
    known = _compiled.get(key)
    if known is None:
        from .triton_kernels.launch import launch

        compiled, values = launch(name, programs, arguments, constants)
        if compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled, values
        return
    compiled, values = known
    words = [word.data_ptr() if isinstance(word, Tensor) else word for word in arguments]
    compiled.run(
        programs, 1, 1, raw_stream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *words, *values,
    )  # fmt: skip


def adam_(
    table: TensorTable,
    record: Tensor,
    options: tuple[float, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    num_steps: int,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """dtypes: of parameter, gradient and state. For options see `triton_kernels/adam.py`."""
    if not table.triton:
        lr, beta1, beta2, _, _, eps, l2, decay, sign, factor = options
        _native.adam_cpu(
            table.table, table.size, record, dtypes, lr, beta1, beta2, eps, l2, decay,
            sign * factor, num_steps, stochastic_rounding, seed,
        )  # fmt: skip
        return
    math = arithmetic_dtype(dtypes[0])
    coefficients = torch.empty(2 * table.size * num_steps, dtype=math, device=table.device)
    adam_coefficients_(table, record, coefficients, num_steps)
    adam_chunks_(table, table.chunks, record, coefficients, dtypes, num_steps, stochastic_rounding)


def adam_coefficients_(
    table: TensorTable, record: Tensor, coefficients: Tensor, num_steps: int
) -> None:
    """Triton: what adam_chunks_ needs for num_steps updates; step counters move on."""
    _run(
        "adam_coefficients", table, -(-table.size // _ROWS), table.table, record, table.size,
        coefficients, num_steps, MATH=coefficients.dtype,
    )  # fmt: skip


def adam_chunks_(
    table: TensorTable,
    chunks: Tensor,
    record: Tensor,
    coefficients: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    num_steps: int,
    stochastic_rounding: bool,
    copies: Tensor | None = None,
) -> None:
    """Triton: the updates of these chunks. copies [T] int64: where bfloat16 copies of the new
    parameters go."""
    param, grad, state = dtypes
    _run(
        "adam", table, len(chunks), table.table, record, chunks, coefficients,
        record if copies is None else copies, num_steps,
        PARAM=param, GRAD=grad, STATE=state, COPY=None if copies is None else torch.bfloat16,
        MATH=coefficients.dtype, STOCHASTIC=stochastic_rounding,
    )  # fmt: skip


def restore_(table: TensorTable, record: Tensor, dtype: torch.dtype) -> None:
    """Triton: parameters to the bits at the record's addresses, moments (of their size) and step
    counters to 0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    _launch("restore", table, table.table, record, table.chunks, PARAM=integer)


def sgd_(
    table: TensorTable,
    record: Tensor,
    options: tuple[float, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    num_steps: int,
) -> None:
    """dtypes: of parameter, gradient and state. For options see `triton_kernels/sgd.py`."""
    if not table.triton:
        lr, momentum, undamped, l2, nesterov, _, _, _, sign, factor = options
        _native.sgd_cpu(
            table.table, table.size, record, dtypes, lr, momentum, undamped, l2, nesterov != 0.0,
            sign * factor, num_steps,
        )  # fmt: skip
        return
    param, grad, state = dtypes
    math = arithmetic_dtype(dtypes[0])
    _launch(
        "sgd", table, table.table, record, table.chunks, num_steps,
        PARAM=param, GRAD=grad, STATE=state, MATH=math,
    )  # fmt: skip


def accumulate_(table: TensorTable, record: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """Returns partial sums of squares of what was accumulated into."""
    if not table.triton:
        return _native.accumulate_cpu(table.table, table.size, record, dtype, weight)
    squares = torch.empty(len(table.chunks), dtype=torch.float32, device=table.device)
    _launch(
        "accumulate", table, table.table, record, table.chunks, squares,
        GRAD=dtype,
    )  # fmt: skip
    return squares


def squares(table: TensorTable, record: Tensor, dtype: torch.dtype) -> Tensor:
    """Partial sums of squares of the gradients."""
    if not table.triton:
        return _native.squared_norm_cpu(table.table, table.size, record, dtype)
    math = arithmetic_dtype(dtype)
    out = torch.empty(len(table.chunks), dtype=math, device=table.device)
    _launch(
        "squares", table, table.table, record, table.chunks, out,
        GRAD=dtype, MATH=math,
    )  # fmt: skip
    return out


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def log2(beta: float) -> float:
    """log2, and for 0 a number so low that a power of it is 0, and its 0th power still 1."""
    return math.log2(beta) if beta > 0.0 else -1e300
