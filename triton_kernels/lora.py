"""Products with low-rank factors, for K slots at once: y += s (x A^T) B^T, and its gradients.

x [K, T, I], a [K, R, I], b [K, O, R], y [K, T, O]. A slot's stride is its own argument everywhere,
so factors may lie in a larger memory. Products take their inputs in HALF; sums are in float32. No
two programs add to one number, so the same inputs give the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _load(base, row, at, stride, rows, columns, HALF: tl.constexpr):
    """[rows, columns] of a matrix whose rows lie `stride` apart; 0 outside."""
    mask = (row < rows)[:, None] & (at < columns)[None, :]
    of = base + row[:, None].to(tl.int64) * stride + at[None, :]
    return tl.load(of, mask=mask, other=0.0).to(HALF)


@triton.jit
def _store(base, row, at, stride, rows, columns, value):
    mask = (row < rows)[:, None] & (at < columns)[None, :]
    of = base + row[:, None].to(tl.int64) * stride + at[None, :]
    tl.store(of, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def lora_shrink_kernel(
    x, a, parts, length, width, rank, span, slots, x_slot, x_row, a_slot,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """parts [S, K, T, rank] float32, with sum over S equal to x A^T. Part s is of `span` columns.

    Axis 0 has blocks of rows, axis 1 slots within parts.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1) // slots
    slot = (tl.program_id(1) % slots).to(tl.int64)
    inner = tl.arange(0, R)
    x += slot * x_slot
    a += slot * a_slot
    total = tl.zeros((ROWS, R), tl.float32)
    first = part * span
    end = tl.minimum(width, first + span)
    for start in range(first, end, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        left = _load(x, row, at, x_row, length, end, HALF)
        right = _load(a, inner, at, width, rank, end, HALF)
        total += tl.dot(left, tl.trans(right), input_precision="ieee")
    to = parts + (part.to(tl.int64) * slots + slot) * length * rank
    _store(to, row, inner, rank, length, rank, total)


@triton.jit
def lora_expand_kernel(
    parts, b, y, h, length, width, rank, num_parts, slots, scale, b_slot, y_slot, y_row,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y += scale * h B^T in place, where h [K, T, rank] is the sum of the parts; h is stored.

    Axis 0 has blocks of rows, axis 1 slots within blocks of columns.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) // slots
    slot = (tl.program_id(1) % slots).to(tl.int64)
    inner = tl.arange(0, R)
    total = tl.zeros((ROWS, R), tl.float32)
    for part in range(0, num_parts):
        of = parts + (slot + slots * part) * length * rank
        total += _load(of, row, inner, rank, length, rank, tl.float32)
    if block == 0:
        _store(h + slot * length * rank, row, inner, rank, length, rank, total)
    at = block * COLUMNS + tl.arange(0, COLUMNS)
    factor = _load(b + slot * b_slot, at, inner, rank, width, rank, HALF)
    y += slot * y_slot
    added = tl.dot(total.to(HALF), tl.trans(factor), input_precision="ieee") * scale
    before = _load(y, row, at, y_row, length, width, tl.float32)
    _store(y, row, at, y_row, length, width, before + added)


@triton.jit
def lora_outer_gradient_kernel(
    d, h, b, parts, d_b, length, width, rank, slots, scale, d_slot, d_row, b_slot, g_slot,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Reads d = dL/dy once. d_b [K, O, rank] = scale * d^T h; parts [S, K, T, rank] float32, with
    sum over S equal to scale * d B, a part for every block of columns.

    Axis 0 has blocks of columns, axis 1 slots.
    """
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, R)
    d += slot * d_slot
    h += slot * length * rank
    parts += (tl.program_id(0).to(tl.int64) * slots + slot) * length * rank
    factor = _load(b + slot * b_slot, at, inner, rank, width, rank, HALF)
    of_b = tl.zeros((COLUMNS, R), tl.float32)
    for start in range(0, length, ROWS):
        row = start + tl.arange(0, ROWS)
        gradient = _load(d, row, at, d_row, length, width, HALF)
        middle = _load(h, row, inner, rank, length, rank, HALF)
        of_b += tl.dot(tl.trans(gradient), middle, input_precision="ieee")
        of_h = tl.dot(gradient, factor, input_precision="ieee") * scale
        _store(parts, row, inner, rank, length, rank, of_h)
    _store(d_b + slot * g_slot, at, inner, rank, width, rank, of_b * scale)


@triton.jit
def lora_inner_gradient_kernel(
    x, d_h, a, d_x, d_a, length, width, rank, x_slot, x_row, a_slot, d_slot, d_row, g_slot,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    OF_X: tl.constexpr,
):  # fmt: skip
    """Reads x once. d_a [K, rank, I] = d_h^T x; with OF_X d_x [K, T, I] += d_h A in place.

    d_h [K, T, rank] float32. Axis 0 has blocks of columns, axis 1 slots.
    """
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, R)
    x += slot * x_slot
    d_h += slot * length * rank
    d_x += slot * d_slot
    factor = _load(a + slot * a_slot, inner, at, width, rank, width, HALF)
    of_a = tl.zeros((R, COLUMNS), tl.float32)
    for start in range(0, length, ROWS):
        row = start + tl.arange(0, ROWS)
        middle = _load(d_h, row, inner, rank, length, rank, HALF)
        values = _load(x, row, at, x_row, length, width, HALF)
        of_a += tl.dot(tl.trans(middle), values, input_precision="ieee")
        if OF_X:
            added = tl.dot(middle, factor, input_precision="ieee")
            before = _load(d_x, row, at, d_row, length, width, tl.float32)
            _store(d_x, row, at, d_row, length, width, before + added)
    _store(d_a + slot * g_slot, inner, at, width, rank, width, of_a)
