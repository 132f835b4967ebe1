# SPDX-License-Identifier: Apache-2.0
"""Causal attention of short sequences: softmax(scale * q k^T) v, and its gradients.

q [texts, heads, T, width]; heads of q share heads of k and v in groups. Sums and softmax are in
float32; products take their inputs in HALF. Exponents are powers of 2.

Few heads keep a GPU busy only if every head of q has programs for rows of q and for rows of k and
v, all at once. With many the gradient of q comes first, and with it what that of k and v needs; a
program of the latter then adds up a group's heads.

ROTATED: q and k came of a rotation by cos and sin (see `rotary.py`), and the gradients are those of
what was rotated.
"""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel
from .rotary import turned_back
from .tiles import store_tile

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _of_head(text, head, text_stride, head_stride):
    """Where a head of a text begins."""
    return text.to(tl.int64) * text_stride + head.to(tl.int64) * head_stride


@triton.jit
def _rows(
    base, row, stride, length, INSIDE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows of a head, in DTYPE; 0 outside. INSIDE: no row lies beyond the last one.

    Numbers of 64 bits would take so many registers that fewer programs run at once.
    """
    at = tl.arange(0, D)
    of = base + row[:, None] * stride + at[None, :]
    if INSIDE and WIDTH == D:
        return tl.load(of).to(DTYPE)
    mask = (row < length)[:, None] & (at < WIDTH)[None, :]
    return tl.load(of, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _attend(
    queries, keys, values, top, total, sums, row, column, factor,
    MASKED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One more block of columns: the rows' highest score, sum of weights, and sums of values."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if MASKED:
        scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    weights = tl.exp2(tl.fma(scores, factor, -higher[:, None]))
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None]
    return higher, total, tl.dot(weights.to(HALF), values, sums, input_precision="ieee")


@triton.jit
def attention_kernel(
    q, k, v, out, normalisers, heads, length, scale, group,
    q_text, q_head, q_row, k_text, k_head, k_row, v_text, v_head, v_row,
    out_text, out_head, out_row,
    HALF: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program for a block of rows of one head; long rows first. normalisers [texts, heads, T]."""
    after_previous_kernel(EARLY)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    text, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = block * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, D)
    q += _of_head(text, head, q_text, q_head)
    k += _of_head(text, head // group, k_text, k_head)
    v += _of_head(text, head // group, v_text, v_head)
    queries = _rows(q, row, q_row, length, False, WIDTH, D, HALF)
    factor = scale * _LOG2_E
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, block * BLOCK, BLOCK):
        column = start + tl.arange(0, BLOCK)
        keys = _rows(k, column, k_row, length, True, WIDTH, D, HALF)
        values = _rows(v, column, v_row, length, True, WIDTH, D, HALF)
        top, total, sums = _attend(
            queries, keys, values, top, total, sums, row, column, factor, False, HALF
        )
    keys = _rows(k, row, k_row, length, False, WIDTH, D, HALF)
    values = _rows(v, row, v_row, length, False, WIDTH, D, HALF)
    top, total, sums = _attend(
        queries, keys, values, top, total, sums, row, row, factor, True, HALF
    )
    out += _of_head(text, head, out_text, out_head)
    store_tile(out, row, at, out_row, length, WIDTH, sums / total[:, None])
    of = tl.program_id(1).to(tl.int64) * length
    tl.store(normalisers + of + row, top + tl.log2(total), mask=row < length)


@triton.jit
def _store_gradient(
    to, value, row, stride, cos, sin, table_row, length,
    KIND: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows of the gradient of q or k, whose dtype is KIND. With ROTATED WIDTH is D."""
    if ROTATED:
        half: tl.constexpr = D // 2
        halves = tl.reshape(value.to(KIND).to(tl.float32), (value.shape[0], 2, half))
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
        at = tl.arange(0, half)
        inside = (row < length)[:, None] & (at < half)[None, :]
        table = row[:, None].to(tl.int64) * table_row + at[None, :]
        a, b = turned_back(
            first, second, cos + table, sin + table, half, inside, to.dtype.element_ty
        )
        store_tile(to, row, at, stride, length, half, a)
        store_tile(to + half, row, at, stride, length, half, b)
    else:
        store_tile(to, row, tl.arange(0, D), stride, length, WIDTH, value)


@triton.jit
def _of_queries(
    queries, keys, values, d, normaliser, along, sums, row, column, factor,
    MASKED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One more block of columns."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    scores = tl.fma(scores, factor, -normaliser[:, None])
    if MASKED:
        scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
    moved = tl.dot(d, tl.trans(values), input_precision="ieee") - along[:, None]
    inner = (tl.exp2(scores) * moved).to(HALF)
    return tl.dot(inner, keys, sums, input_precision="ieee")


@triton.jit
def _row_gradient(
    q, k, v, out, gradient, normalisers, along_rows, q_gradient, block, length, scale,
    q_row, k_row, v_row, out_row, d_row, dq_row, cos, sin, table_row,
    KEEP: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of rows of q. KEEP: along_rows [T] gets sums of out * gradient."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    factor = scale * _LOG2_E
    queries = _rows(q, row, q_row, length, False, WIDTH, D, HALF)
    d = _rows(gradient, row, d_row, length, False, WIDTH, D, HALF)
    o = _rows(out, row, out_row, length, False, WIDTH, D, tl.float32)
    along = tl.sum(o * d.to(tl.float32), 1)
    if KEEP:
        tl.store(along_rows + row, along, mask=row < length)
    normaliser = tl.load(normalisers + row, mask=row < length, other=0.0)
    sums = tl.zeros((BLOCK, D), tl.float32)
    for start in tl.range(0, block * BLOCK, BLOCK, num_stages=2):
        column = start + tl.arange(0, BLOCK)
        keys = _rows(k, column, k_row, length, True, WIDTH, D, HALF)
        values = _rows(v, column, v_row, length, True, WIDTH, D, HALF)
        sums = _of_queries(
            queries, keys, values, d, normaliser, along, sums, row, column, factor, False, HALF
        )
    keys = _rows(k, row, k_row, length, False, WIDTH, D, HALF)
    values = _rows(v, row, v_row, length, False, WIDTH, D, HALF)
    sums = _of_queries(
        queries, keys, values, d, normaliser, along, sums, row, row, factor, True, HALF
    )
    kind: tl.constexpr = q.dtype.element_ty
    _store_gradient(
        q_gradient, sums * scale, row, dq_row, cos, sin, table_row, length, kind, ROTATED, WIDTH, D
    )


@triton.jit
def _of_keys_and_values(
    queries, keys, values, d, normaliser, along, of_keys, of_values, row, column, factor,
    MASKED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One more block of rows. Scores lie transposed, as both products read them.

    Beyond the last row q, d, normaliser and along are 0, and so is what is added.
    """
    scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    scores = tl.fma(scores, factor, -normaliser[None, :])
    if MASKED:
        scores = tl.where(column[:, None] <= row[None, :], scores, float("-inf"))
    weights = tl.exp2(scores)
    of_values = tl.dot(weights.to(HALF), d, of_values, input_precision="ieee")
    moved = tl.dot(values, tl.trans(d), input_precision="ieee") - along[None, :]
    inner = (weights * moved).to(HALF)
    return tl.dot(inner, queries, of_keys, input_precision="ieee"), of_values


@triton.jit
def attention_gradient_kernel(
    q, k, v, out, gradient, normalisers, q_gradient, k_gradient, v_gradient,
    heads, length, scale, group,
    q_text, q_head, q_row, k_text, k_head, k_row, v_text, v_head, v_row,
    out_text, out_head, out_row, d_text, d_head, d_row, dq_text, dq_head, dq_row,
    HALF: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The gradients of few heads. The first half of the programs of an axis are for rows of q, the
    second for rows of k and v.

    k_gradient, v_gradient [texts, T, heads, width]: a part for every head of q.
    """
    after_previous_kernel(EARLY)
    blocks = tl.num_programs(0) // 2
    text, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q += _of_head(text, head, q_text, q_head)
    k += _of_head(text, head // group, k_text, k_head)
    v += _of_head(text, head // group, v_text, v_head)
    out += _of_head(text, head, out_text, out_head)
    gradient += _of_head(text, head, d_text, d_head)
    normalisers += tl.program_id(1).to(tl.int64) * length
    if tl.program_id(0) < blocks:
        block = blocks - 1 - tl.program_id(0)
        q_gradient += _of_head(text, head, dq_text, dq_head)
        _row_gradient(
            q, k, v, out, gradient, normalisers, normalisers, q_gradient, block, length,
            scale, q_row, k_row, v_row, out_row, d_row, dq_row, q, q, 0, False, False, HALF, BLOCK,
            WIDTH, D,
        )  # fmt: skip
    else:
        block = tl.program_id(0) - blocks
        column = block * BLOCK + tl.arange(0, BLOCK)
        at = tl.arange(0, D)
        keys = _rows(k, column, k_row, length, False, WIDTH, D, HALF)
        values = _rows(v, column, v_row, length, False, WIDTH, D, HALF)
        of_keys = tl.zeros((BLOCK, D), tl.float32)
        of_values = tl.zeros((BLOCK, D), tl.float32)
        for start in range(block * BLOCK, length, BLOCK):
            row = start + tl.arange(0, BLOCK)
            queries = _rows(q, row, q_row, length, False, WIDTH, D, HALF)
            d = _rows(gradient, row, d_row, length, False, WIDTH, D, HALF)
            o = _rows(out, row, out_row, length, False, WIDTH, D, tl.float32)
            along = tl.sum(o * d.to(tl.float32), 1)
            normaliser = tl.load(normalisers + row, mask=row < length, other=0.0)
            of_keys, of_values = _of_keys_and_values(
                queries, keys, values, d, normaliser, along, of_keys, of_values, row, column,
                scale * _LOG2_E, True, HALF,
            )  # fmt: skip
        together = heads * WIDTH
        part = text.to(tl.int64) * length * together + head * WIDTH
        store_tile(k_gradient + part, column, at, together, length, WIDTH, of_keys * scale)
        store_tile(v_gradient + part, column, at, together, length, WIDTH, of_values)


@triton.jit
def attention_q_gradient_kernel(
    q, k, v, out, gradient, normalisers, along, q_gradient, cos, sin,
    heads, length, scale, group,
    q_text, q_head, q_row, k_text, k_head, k_row, v_text, v_head, v_row,
    out_text, out_head, out_row, d_text, d_head, d_row, dq_text, dq_head, dq_row,
    table_text, table_row,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradients of many heads' q: a program for a block of rows of a head.

    along [texts, heads, T]: for the kernel of k and v.
    """
    after_previous_kernel(EARLY)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    text, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q += _of_head(text, head, q_text, q_head)
    k += _of_head(text, head // group, k_text, k_head)
    v += _of_head(text, head // group, v_text, v_head)
    out += _of_head(text, head, out_text, out_head)
    gradient += _of_head(text, head, d_text, d_head)
    q_gradient += _of_head(text, head, dq_text, dq_head)
    of = tl.program_id(1).to(tl.int64) * length
    cos += text.to(tl.int64) * table_text
    sin += text.to(tl.int64) * table_text
    _row_gradient(
        q, k, v, out, gradient, normalisers + of, along + of, q_gradient, block, length,
        scale, q_row, k_row, v_row, out_row, d_row, dq_row, cos, sin, table_row, True, ROTATED,
        HALF, BLOCK, WIDTH, D,
    )  # fmt: skip


@triton.jit
def _add_rows(
    q, gradient, normalisers, along, of, keys, values, of_keys, of_values, row, column, length,
    factor, q_row, d_row,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """What a block of rows of a head adds to the gradients of keys and values.

    of: where the head begins in normalisers and along.
    """
    queries = _rows(q, row, q_row, length, False, WIDTH, D, HALF)
    d = _rows(gradient, row, d_row, length, False, WIDTH, D, HALF)
    normaliser = tl.load(normalisers + of + row, mask=row < length, other=0.0)
    sums = tl.load(along + of + row, mask=row < length, other=0.0)
    return _of_keys_and_values(
        queries, keys, values, d, normaliser, sums, of_keys, of_values, row, column, factor,
        MASKED, HALF,
    )  # fmt: skip


@triton.jit
def attention_kv_gradient_kernel(
    q, k, v, gradient, normalisers, along, k_gradient, v_gradient, cos, sin,
    heads, length, scale, group,
    q_text, q_head, q_row, k_text, k_head, k_row, v_text, v_head, v_row, d_text, d_head, d_row,
    dk_text, dk_head, dk_row, dv_text, dv_head, dv_row, table_text, table_row,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradients of many heads' k and v: a program for a block of rows and the heads of a group.

    heads: of k and v. normalisers, along [texts, heads of q, T].
    """
    after_previous_kernel(EARLY)
    block = tl.program_id(0)
    text, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    column = block * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, D)
    factor = scale * _LOG2_E
    k += _of_head(text, head, k_text, k_head)
    v += _of_head(text, head, v_text, v_head)
    keys = _rows(k, column, k_row, length, False, WIDTH, D, HALF)
    values = _rows(v, column, v_row, length, False, WIDTH, D, HALF)
    of_keys = tl.zeros((BLOCK, D), tl.float32)
    of_values = tl.zeros((BLOCK, D), tl.float32)
    for member in range(0, group):
        own = head * group + member
        rows = q + _of_head(text, own, q_text, q_head)
        moved = gradient + _of_head(text, own, d_text, d_head)
        of = (tl.program_id(1).to(tl.int64) * group + member) * length
        of_keys, of_values = _add_rows(
            rows, moved, normalisers, along, of, keys, values, of_keys, of_values, column,
            column, length, factor, q_row, d_row, True, WIDTH, D, HALF,
        )  # fmt: skip
        for start in tl.range(block * BLOCK + BLOCK, length, BLOCK, num_stages=2):
            row = start + tl.arange(0, BLOCK)
            of_keys, of_values = _add_rows(
                rows, moved, normalisers, along, of, keys, values, of_keys, of_values, row,
                column, length, factor, q_row, d_row, False, WIDTH, D, HALF,
            )  # fmt: skip
    k_gradient += _of_head(text, head, dk_text, dk_head)
    v_gradient += _of_head(text, head, dv_text, dv_head)
    cos += text.to(tl.int64) * table_text
    sin += text.to(tl.int64) * table_text
    kind: tl.constexpr = k.dtype.element_ty
    _store_gradient(
        k_gradient, of_keys * scale, column, dk_row, cos, sin, table_row, length, kind, ROTATED,
        WIDTH, D,
    )  # fmt: skip
    store_tile(v_gradient, column, at, dv_row, length, WIDTH, of_values)
