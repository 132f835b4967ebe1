# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: x * cos + rotated * sin; rotated is (-x[second half], x[first half])."""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel

# Pairs of a row and a head that a program takes. A row's heads are neighbours.
PAIRS = 32


@triton.jit
def _table(cos, sin, half, inside):
    """Both halves of cos and of sin."""
    cos1 = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + half, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + half, mask=inside, other=0.0).to(tl.float32)
    return cos1, cos2, sin1, sin2


@triton.jit
def turned_back(first, second, cos, sin, half, inside, KIND: tl.constexpr):
    """The gradient of what was rotated, in halves, from halves of the result's gradient.

    cos, sin: addresses for the first half's elements.
    """
    cos1, cos2, sin1, sin2 = _table(cos, sin, half, inside)
    a = (first * cos1).to(KIND).to(tl.float32) + (second * sin2).to(KIND).to(tl.float32)
    b = (second * cos2).to(KIND).to(tl.float32) - (first * sin1).to(KIND).to(tl.float32)
    return a, b


@triton.jit
def _rotate(
    x, cos, sin, out, block, heads, length, half, x_text, x_head, x_row, out_text, out_head,
    out_row, table_text, table_row,
    BACKWARD: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A block of pairs of q, or of k."""
    place = block * PAIRS + tl.arange(0, PAIRS)
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    text = tl.program_id(1).to(tl.int64)
    x += text * x_text
    out += text * out_text
    cos += text * table_text
    sin += text * table_text
    at = tl.arange(0, HALF)[None, :]
    inside = (row < length)[:, None] & (at < half)
    of = x + (head * x_head + row * x_row)[:, None] + at
    first = tl.load(of, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(of + half, mask=inside, other=0.0).to(tl.float32)
    table = (row * table_row)[:, None] + at
    cos += table
    sin += table
    kind = out.dtype.element_ty
    if BACKWARD:
        a, b = turned_back(first, second, cos, sin, half, inside, kind)
    else:
        cos1, cos2, sin1, sin2 = _table(cos, sin, half, inside)
        a = (first * cos1).to(kind).to(tl.float32) - (second * sin1).to(kind).to(tl.float32)
        b = (second * cos2).to(kind).to(tl.float32) + (first * sin2).to(kind).to(tl.float32)
    to = out + (head * out_head + row * out_row)[:, None] + at
    tl.store(to, a.to(kind), mask=inside)
    tl.store(to + half, b.to(kind), mask=inside)


@triton.jit(do_not_specialize=["length"])
def rotary_kernel(
    q, k, cos, sin, q_out, k_out, heads, k_heads, length, half,
    q_text, q_head, q_row, q_out_text, q_out_head, q_out_row,
    k_text, k_head, k_row, k_out_text, k_out_head, k_out_row, table_text, table_row,
    BACKWARD: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes PAIRS pairs of a row and a head. The first ones are for q, the others for k.
    Axis 1 of the grid is the text.

    q [texts, heads, T, 2 * half], k [texts, k_heads, T, 2 * half] by strides; cos, sin
    [texts, T, 2 * half], or one for all texts.

    BACKWARD: the gradients of q and k from those of the results. Each product is rounded to the
    result's dtype, as the model rounds it.
    """
    after_previous_kernel(EARLY)
    block, of_q = tl.program_id(0), tl.cdiv(heads * length, PAIRS)
    if block < of_q:
        _rotate(
            q, cos, sin, q_out, block, heads, length, half, q_text, q_head, q_row, q_out_text,
            q_out_head, q_out_row, table_text, table_row, BACKWARD, PAIRS, HALF,
        )  # fmt: skip
    else:
        _rotate(
            k, cos, sin, k_out, block - of_q, k_heads, length, half, k_text, k_head, k_row,
            k_out_text, k_out_head, k_out_row, table_text, table_row, BACKWARD, PAIRS, HALF,
        )  # fmt: skip
