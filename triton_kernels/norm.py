# SPDX-License-Identifier: Apache-2.0
"""Layer norm and RMS norm of rows [T, D], their gradients, and sums of columns.

    y = (x - mean) * r * w + b,  r = 1 / sqrt(mean((x - mean)^2) + eps)

RMS leaves the mean out. A weight may be stored without 1 (OFFSET = 1: w = 1 + weight).
"""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel
from .tiles import load_tile, store_tile

# A block of column_sums_kernel: narrow, so that even few columns keep a GPU busy.
SUM_ROWS = 256
SUM_COLUMNS = 16


@triton.jit(do_not_specialize=["eps", "rows"])
def norm_kernel(
    x, other, total, weight, bias, y, narrow, means, factors, stride, rows, columns, eps,
    RMS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, BIAS: tl.constexpr,
    NARROW: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program for ROWS rows. narrow: y in bfloat16 too. means, factors [T]: for the gradient.

    ADD: the norm is of total [T, D] = x + other, which is written, rounded to x's dtype.

    ROUND: the normalised row is rounded to x's dtype before the weight, as some models do.
    """
    after_previous_kernel(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = load_tile(x, row, at, stride, rows, columns, tl.float32)
    if ADD:
        value += load_tile(other, row, at, columns, rows, columns, tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
        store_tile(total, row, at, columns, rows, columns, value)
    if not RMS:
        mean = tl.sum(value, 1) / columns
        tl.store(means + row, mean, mask=row < rows)
        value = tl.where(inside[None, :], value - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)
    tl.store(factors + row, factor, mask=row < rows)
    value *= factor[:, None]
    if ROUND:
        value = value.to(x.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + OFFSET
    value *= scale[None, :]
    if BIAS:
        value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    store_tile(y, row, at, columns, rows, columns, value)
    if NARROW:
        store_tile(narrow, row, at, columns, rows, columns, value)


@triton.jit(do_not_specialize=["rows"])
def norm_gradient_kernel(
    x, weight, gradient, other, more, means, factors, x_gradient, narrow, partial, stride, rows,
    columns, RMS: tl.constexpr, OFFSET: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    MORE: tl.constexpr, NARROW: tl.constexpr, OF_WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs take ROWS rows in turn.

    gradient, other [T, D]: their sum is y's gradient; FIRST, SECOND: which of them there are.
    more [T, D]: with MORE added to x's gradient, for x goes elsewhere too.
    narrow [T, D]: with NARROW gets x's gradient too, in its own dtype.
    partial [programs, D], or [2, programs, D] with BIAS: each program's part of the weight's
    gradient, and of the bias's.
    """
    after_previous_kernel(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + OFFSET
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        value = load_tile(x, row, at, stride, rows, columns, tl.float32)
        factor = tl.load(factors + row, mask=row < rows, other=0.0)[:, None]
        if not RMS:
            mean = tl.load(means + row, mask=row < rows, other=0.0)
            value = tl.where(inside[None, :], value - mean[:, None], 0.0)
        value *= factor
        g = tl.zeros((ROWS, BLOCK), tl.float32)
        if FIRST:
            g += load_tile(gradient, row, at, columns, rows, columns, tl.float32)
        if SECOND:
            g += load_tile(other, row, at, columns, rows, columns, tl.float32)
        if OF_WEIGHT:
            of_weight += tl.sum(g * value, 0)
            if BIAS:
                of_bias += tl.sum(g, 0)
        g *= scale[None, :]
        along = tl.sum(g * value, 1)[:, None] / columns
        if RMS:
            moved = (g - value * along) * factor
        else:
            moved = (g - tl.sum(g, 1)[:, None] / columns - value * along) * factor
        if MORE:
            moved += load_tile(more, row, at, columns, rows, columns, tl.float32)
        store_tile(x_gradient, row, at, columns, rows, columns, moved)
        if NARROW:
            store_tile(narrow, row, at, columns, rows, columns, moved)
    if OF_WEIGHT:
        to = partial + program.to(tl.int64) * columns + at
        tl.store(to, of_weight, mask=inside)
        if BIAS:
            tl.store(to + programs.to(tl.int64) * columns, of_bias, mask=inside)


@triton.jit
def column_sums_kernel(
    values, sums, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """sums [columns] of values [rows, columns], in float32. A program for COLUMNS of them.

    A second axis of the grid is for several matrices, one after the other in memory.
    """
    after_previous_kernel(EARLY)
    matrix = tl.program_id(1).to(tl.int64)
    values += matrix * rows * stride
    sums += matrix * columns
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    lanes = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + lanes
        of = values + row[:, None].to(tl.int64) * stride + at[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(of, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + at, tl.sum(total, 0).to(sums.dtype.element_ty), mask=inside)
