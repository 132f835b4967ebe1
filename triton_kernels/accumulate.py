# SPDX-License-Identifier: Apache-2.0
"""into += weight * grad over a list of tensors, and the squares that a global norm sums.

The weight is in `record`: AccumulateOptions. squares [programs]: the sum over each program's chunk.
"""

import triton
import triton.language as tl

from ..optim._record import AccumulateOptions
from .dependent_launch import after_previous_kernel
from .multi_tensor import PARAM_AT, gradient, locate, option, place, read, whole_blocks, write

WEIGHT = place(AccumulateOptions, "weight")


@triton.jit
def _accumulate(
    into_at, grad_at, offsets, end, weight, GRAD: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    into = read(into_at, offsets, end, tl.float32, tl.float32, WHOLE)
    grad = read(grad_at, offsets, end, GRAD, tl.float32, WHOLE)
    into = tl.fma(grad, weight, into)
    write(into_at, offsets, end, into, tl.float32, WHOLE)
    return into


@triton.jit
def accumulate_kernel(
    table, record, chunks, squares, GRAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(EARLY)
    row, entry, start, end = locate(table, chunks, CHUNK)
    into_at = tl.load(entry + PARAM_AT)
    grad_at = gradient(record, row)
    weight = option(record, WEIGHT).to(tl.float32)
    whole = whole_blocks(into_at | grad_at, start, end, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    square = tl.zeros((BLOCK,), tl.float32)
    for _ in range(whole):
        into = _accumulate(into_at, grad_at, offsets, end, weight, GRAD, WHOLE=True)
        square = tl.fma(into, into, square)
        offsets += BLOCK
    for _ in range(whole, tl.cdiv(end - start, BLOCK)):
        into = _accumulate(into_at, grad_at, offsets, end, weight, GRAD, WHOLE=False)
        square = tl.fma(into, into, square)
        offsets += BLOCK
    tl.store(squares + tl.program_id(0), tl.sum(square))


@triton.jit
def squares_kernel(
    table, record, chunks, squares,
    GRAD: tl.constexpr, MATH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """squares of the gradients, which are only read."""
    after_previous_kernel(EARLY)
    row, _, start, end = locate(table, chunks, CHUNK)
    grad_at = gradient(record, row)
    whole = whole_blocks(grad_at, start, end, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    square = tl.zeros((BLOCK,), MATH)
    for _ in range(whole):
        grad = read(grad_at, offsets, end, GRAD, MATH, WHOLE=True)
        square = tl.fma(grad, grad, square)
        offsets += BLOCK
    for _ in range(whole, tl.cdiv(end - start, BLOCK)):
        grad = read(grad_at, offsets, end, GRAD, MATH, WHOLE=False)
        square = tl.fma(grad, grad, square)
        offsets += BLOCK
    tl.store(squares + tl.program_id(0), tl.sum(square))
