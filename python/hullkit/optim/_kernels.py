# SPDX-License-Identifier: Apache-2.0
"""The way to the optimizers' kernels: the C++ core for CPU tensors, Triton for CUDA tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..native import kernels
from ._record import COEFFICIENT_ROWS
from ._tensor_table import TensorTable
from ._triton_launch import MOST_EARLY, Launcher, launcher

# Launchers by what their kernels were compiled for.
_compiled: dict[Any, Launcher] = {}


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
    key = (name, device, programs <= MOST_EARLY, *constants.values())
    known = _compiled.get(key)
    if known is not None:
        known(programs, arguments)
        return
    from ..triton_kernels.launch import launch

    compiled, values = launch(name, programs, arguments, constants)
    direct = launcher(compiled, values, device)
    if direct is not None:
        _compiled[key] = direct


def adam_(
    table: TensorTable,
    record: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    num_steps: int,
    stochastic_rounding: bool,
) -> None:
    """dtypes: of parameter, gradient and state. The record holds AdamOptions."""
    if not table.triton:
        kernels.adam_cpu(table.table, record, dtypes, num_steps, stochastic_rounding)
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
        "adam_coefficients", table, -(-table.size // COEFFICIENT_ROWS), table.table, record,
        table.size, coefficients, num_steps, MATH=coefficients.dtype,
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
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    num_steps: int,
) -> None:
    """dtypes: of parameter, gradient and state. The record holds SGDOptions."""
    if not table.triton:
        kernels.sgd_cpu(table.table, record, dtypes, num_steps)
        return
    param, grad, state = dtypes
    math = arithmetic_dtype(dtypes[0])
    _launch(
        "sgd", table, table.table, record, table.chunks, num_steps,
        PARAM=param, GRAD=grad, STATE=state, MATH=math,
    )  # fmt: skip


def accumulate_(table: TensorTable, record: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns partial sums of squares of what was accumulated into. The record holds
    AccumulateOptions."""
    if not table.triton:
        return kernels.accumulate_cpu(table.table, record, dtype)
    squares = torch.empty(len(table.chunks), dtype=torch.float32, device=table.device)
    _launch(
        "accumulate", table, table.table, record, table.chunks, squares,
        GRAD=dtype,
    )  # fmt: skip
    return squares


def squares(table: TensorTable, record: Tensor, dtype: torch.dtype) -> Tensor:
    """Partial sums of squares of the gradients."""
    if not table.triton:
        return kernels.squared_norm_cpu(table.table, record, dtype)
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
