# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside linear layers, K of them at once: y + scale (x a^T) b^T, and gradients.

    shrink: inner = scale x a^T             expand: y += inner b^T
    expand's gradients: d_b = d^T inner;    d_inner = scale d b
    shrink's gradients: d_a = d_inner^T x;  d_x += d_inner a

x [K, T, D], y and d [K, T, E], a [K, R, D], b [K, E, R]. Products with the thin side R stay on
chip. Up to three layers that read the same x are shrunk together: x is read, and d_x written, once
for all of them.

A sum over D or E is split between programs, so that one text keeps a GPU busy; parts
[K, PARTS, T, R] are in float32 and added up in order. Forwards every program that needs a sum adds
up for itself. Backwards many would do so again and again, so the program that finishes a block's
last part adds up for all. MOST is 1 where sums have one part, else MOST_PARTS. Products take their
inputs in HALF and add up in float32.
"""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel
from .tiles import load_tile, store_tile

# Blocks of rows of T and of columns of D or E.
ROWS = 64
COLUMNS = 128
MOST_PARTS = 8
# The blocks where d_a alone is computed: larger ones would be too few for a GPU.
FEW_ROWS, FEW_COLUMNS = 128, 32


@triton.jit
def _sum_of_parts(parts, row, rank_at, rows, rank, count, MOST: tl.constexpr):
    """[ROWS, R] float32. All loads begin at once; those of parts beyond `count` read nothing."""
    total = tl.zeros((row.shape[0], rank_at.shape[0]), tl.float32)
    for part in tl.static_range(MOST):
        inside = tl.where(part < count, rank, 0)
        total += load_tile(parts + part * rows * rank, row, rank_at, rank, rows, inside, tl.float32)
    return total


@triton.jit
def _thin(factor, column, rank_at, columns, rank, column_stride, rank_stride, HALF: tl.constexpr):
    """[COLUMNS, R] of a factor [R, D] or [E, R]."""
    mask = (column < columns)[:, None] & (rank_at < rank)[None, :]
    of = factor + column[:, None].to(tl.int64) * column_stride + rank_at[None, :] * rank_stride
    return tl.load(of, mask=mask, other=0.0).to(HALF)


@triton.jit(do_not_specialize=["scale"])
def low_rank_shrink_kernel(
    x, a, a2, a3, parts, inner, finished, rows, columns, rank, x_slot, x_row, a_slot, count,
    length, scale, LAYERS: tl.constexpr, WHOLE: tl.constexpr,
    HALF: tl.constexpr, R: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for a block of rows and `length` columns, which are one of `count` parts.

    a, a2, a3: of LAYERS layers. parts [LAYERS, K, PARTS, T, R]. With WHOLE the program that
    finishes a block's last part writes inner [LAYERS, K, T, R].
    finished [K, BLOCKS] int32: 0 before and after. It counts the finished parts of a block of rows.
    """
    after_previous_kernel(EARLY)
    slot, slots = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    block, part = tl.program_id(0) // count, tl.program_id(0) % count
    row = block * ROWS + tl.arange(0, ROWS)
    rank_at = tl.arange(0, R)
    total = tl.zeros((ROWS, R), tl.float32)
    total2 = tl.zeros((ROWS, R), tl.float32)
    total3 = tl.zeros((ROWS, R), tl.float32)
    x += slot * x_slot
    end = tl.minimum(part * length + length, columns)
    for start in range(part * length, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        values = load_tile(x, row, column, x_row, rows, columns, HALF)
        thin = _thin(a + slot * a_slot, column, rank_at, columns, rank, 1, columns, HALF)
        total += tl.dot(values, thin, input_precision="ieee")
        if LAYERS > 1:
            thin = _thin(a2 + slot * a_slot, column, rank_at, columns, rank, 1, columns, HALF)
            total2 += tl.dot(values, thin, input_precision="ieee")
        if LAYERS > 2:
            thin = _thin(a3 + slot * a_slot, column, rank_at, columns, rank, 1, columns, HALF)
            total3 += tl.dot(values, thin, input_precision="ieee")
    if WHOLE and MOST == 1:
        to = inner + slot * rows * rank
        next_layer = slots * rows * rank
    else:
        to = parts + (slot * count + part) * rows * rank
        next_layer = slots * count * rows * rank
    store_tile(to, row, rank_at, rank, rows, rank, total * scale)
    if LAYERS > 1:
        store_tile(to + next_layer, row, rank_at, rank, rows, rank, total2 * scale)
    if LAYERS > 2:
        store_tile(to + 2 * next_layer, row, rank_at, rank, rows, rank, total3 * scale)
    if WHOLE and MOST > 1:
        of = finished + slot * tl.cdiv(rows, ROWS) + block
        tl.debug_barrier()  # the whole part is written before it is counted
        if tl.atomic_add(of, 1, sem="acq_rel") == count - 1:
            for layer in tl.static_range(LAYERS):
                of_slot = (layer * slots + slot) * rows * rank
                whole = _sum_of_parts(
                    parts + of_slot * count, row, rank_at, rows, rank, count, MOST
                )
                store_tile(inner + of_slot, row, rank_at, rank, rows, rank, whole)
            tl.store(of, 0)


@triton.jit
def low_rank_expand_kernel(
    y, b, parts, inner, finished, rows, columns, rank, b_slot, count, LAYERS: tl.constexpr,
    HALF: tl.constexpr, R: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for a block of y [K, T, E].

    The first of a row writes inner [K, T, R], and 0 to the row's places of finished
    [LAYERS, K, BLOCKS].
    """
    after_previous_kernel(EARLY)
    slot, slots = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    block, place = tl.program_id(0) // across, tl.program_id(0) % across
    row = block * ROWS + tl.arange(0, ROWS)
    column = place * COLUMNS + tl.arange(0, COLUMNS)
    rank_at = tl.arange(0, R)
    parts += slot * count * rows * rank
    total = _sum_of_parts(parts, row, rank_at, rows, rank, count, MOST)
    if place == 0:
        store_tile(inner + slot * rows * rank, row, rank_at, rank, rows, rank, total)
        for layer in tl.static_range(LAYERS):
            tl.store(finished + (layer * slots + slot) * tl.cdiv(rows, ROWS) + block, 0)
    thin = load_tile(b + slot * b_slot, column, rank_at, rank, columns, rank, HALF)
    sums = tl.dot(total.to(HALF), tl.trans(thin), input_precision="ieee")
    y += slot * rows * columns
    sums += load_tile(y, row, column, columns, rows, columns, tl.float32)
    store_tile(y, row, column, columns, rows, columns, sums)


@triton.jit(do_not_specialize=["scale"])
def low_rank_expand_gradient_kernel(
    d, d2, d3, b, b2, b3, inner, inner2, inner3, d_b, d_b2, d_b3, parts, d_inner, finished, rows,
    rank, columns, columns2, columns3, b_slot, d_b_slot, length, scale,
    LAYERS: tl.constexpr, OF_B: tl.constexpr,
    HALF: tl.constexpr, R: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs of the first layer, then those of the next: they write d_inner, then blocks of d_b.

    d, d2, d3 and what else has numbers: of LAYERS layers. d_inner [LAYERS, K, T, R], d_b [K, E, R].
    length: columns of a part of a sum.
    finished [LAYERS, K, BLOCKS] int32: 0 before and after. It counts a block's finished parts.
    """
    after_previous_kernel(EARLY)
    slot, slots = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    at = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    # Triton makes an argument that is 1 a constant, which no branch could replace.
    columns = tl.cast(columns, tl.int32)
    columns2 = tl.cast(columns2, tl.int32)
    count = tl.cdiv(columns, length)
    for _ in tl.static_range(LAYERS - 1):
        programs = blocks * count + tl.cdiv(columns, COLUMNS) * OF_B
        if at >= programs:  # of a later layer
            at -= programs
            parts += slots * count * rows * rank
            d_inner += slots * rows * rank
            d, d2 = d2, d3
            b, b2 = b2, b3
            inner, inner2 = inner2, inner3
            d_b, d_b2 = d_b2, d_b3
            finished += slots * blocks
            columns, columns2 = columns2, tl.cast(columns3, tl.int32)
            count = tl.cdiv(columns, length)
    rank_at = tl.arange(0, R)
    d += slot * rows * columns
    if at < blocks * count:
        block, part = at // count, at % count
        row = block * ROWS + tl.arange(0, ROWS)
        own = tl.zeros((ROWS, R), tl.float32)
        end = tl.minimum(part * length + length, columns)
        for start in range(part * length, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            values = load_tile(d, row, column, columns, rows, columns, HALF)
            thin = _thin(b + slot * b_slot, column, rank_at, columns, rank, rank, 1, HALF)
            own += tl.dot(values, thin, input_precision="ieee")
        own = own * scale
        d_inner += slot * rows * rank
        if MOST == 1:
            store_tile(d_inner, row, rank_at, rank, rows, rank, own)
        else:
            parts += slot * count * rows * rank
            store_tile(parts + part * rows * rank, row, rank_at, rank, rows, rank, own)
            of = finished + slot * blocks + block
            tl.debug_barrier()  # the whole part is written before it is counted
            if tl.atomic_add(of, 1, sem="acq_rel") == count - 1:
                whole = _sum_of_parts(parts, row, rank_at, rows, rank, count, MOST)
                store_tile(d_inner, row, rank_at, rank, rows, rank, whole)
                tl.store(of, 0)
    elif OF_B:
        column = (at - blocks * count) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS, R), tl.float32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            values = load_tile(d, row, column, columns, rows, columns, HALF)
            thin = load_tile(inner + slot * rows * rank, row, rank_at, rank, rows, rank, HALF)
            total += tl.dot(tl.trans(values), thin, input_precision="ieee")
        store_tile(d_b + slot * d_b_slot, column, rank_at, rank, columns, rank, total)


@triton.jit
def _of_a(d_inner, values, row, rank_at, rows, rank, HALF: tl.constexpr):
    """[R, COLUMNS]: what a block of rows of x adds to d_a."""
    thin = load_tile(d_inner, row, rank_at, rank, rows, rank, HALF)
    return tl.dot(tl.trans(thin), values, input_precision="ieee")


@triton.jit
def _of_x(d_inner, a, row, column, rank_at, rows, columns, rank, HALF: tl.constexpr):
    """[ROWS, COLUMNS]: what a layer adds to d_x."""
    thin = load_tile(d_inner, row, rank_at, rank, rows, rank, HALF)
    factor = load_tile(a, rank_at, column, columns, rank, columns, HALF)
    return tl.dot(thin, factor, input_precision="ieee")


@triton.jit
def low_rank_shrink_gradient_kernel(
    x, a, a2, a3, d_inner, d_inner2, d_inner3, d_a, d_a2, d_a3, d_x, rows, columns, rank,
    x_slot, x_row, a_slot, d_a_slot,
    LAYERS: tl.constexpr, OF_A: tl.constexpr, OF_X: tl.constexpr, ADD: tl.constexpr,
    HALF: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The first programs write blocks of d_a [K, R, D], the others add to blocks of d_x [K, T, D].

    a, a2, a3, their d_inner and d_a: of LAYERS layers.
    ADD: d_x has a value already.
    """
    after_previous_kernel(EARLY)
    slot = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    rank_at = tl.arange(0, R)
    of = slot * rows * rank
    if tl.program_id(0) < across:
        if OF_A:
            column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.zeros((R, COLUMNS), tl.float32)
            total2 = tl.zeros((R, COLUMNS), tl.float32)
            total3 = tl.zeros((R, COLUMNS), tl.float32)
            for start in range(0, rows, ROWS):
                row = start + tl.arange(0, ROWS)
                values = load_tile(x + slot * x_slot, row, column, x_row, rows, columns, HALF)
                total += _of_a(d_inner + of, values, row, rank_at, rows, rank, HALF)
                if LAYERS > 1:
                    total2 += _of_a(d_inner2 + of, values, row, rank_at, rows, rank, HALF)
                if LAYERS > 2:
                    total3 += _of_a(d_inner3 + of, values, row, rank_at, rows, rank, HALF)
            to = slot * d_a_slot
            store_tile(d_a + to, rank_at, column, columns, rank, columns, total)
            if LAYERS > 1:
                store_tile(d_a2 + to, rank_at, column, columns, rank, columns, total2)
            if LAYERS > 2:
                store_tile(d_a3 + to, rank_at, column, columns, rank, columns, total3)
    elif OF_X:
        other = tl.program_id(0) - across
        row = (other // across) * ROWS + tl.arange(0, ROWS)
        column = (other % across) * COLUMNS + tl.arange(0, COLUMNS)
        at = slot * a_slot
        sums = _of_x(d_inner + of, a + at, row, column, rank_at, rows, columns, rank, HALF)
        if LAYERS > 1:
            sums += _of_x(d_inner2 + of, a2 + at, row, column, rank_at, rows, columns, rank, HALF)
        if LAYERS > 2:
            sums += _of_x(d_inner3 + of, a3 + at, row, column, rank_at, rows, columns, rank, HALF)
        target = d_x + slot * rows * columns
        if ADD:
            sums += load_tile(target, row, column, columns, rows, columns, tl.float32)
        store_tile(target, row, column, columns, rows, columns, sums)
