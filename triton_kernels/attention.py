# SPDX-License-Identifier: Apache-2.0
"""Causal attention of short sequences: softmax(scale * q k^T) v, and its gradients.

Heads of q share heads of k and v in groups. Sums and softmax are in float32; products take their
inputs in HALF. Exponents are powers of 2.
"""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel
from .tiles import load_tile, store_tile

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    q, k, v, out, normalisers, length, width, scale, group,
    q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row,
    HALF: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for a block of rows of one head; long rows first. normalisers [heads, T]."""
    after_previous_kernel(EARLY)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    shared = head // group
    row = block * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, D)
    queries = load_tile(q + head * q_head, row, at, q_row, length, width, HALF)
    factor = scale * _LOG2_E
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        column = start + tl.arange(0, BLOCK)
        keys = load_tile(k + shared * k_head, column, at, k_row, length, width, HALF)
        values = load_tile(v + shared * v_head, column, at, v_row, length, width, HALF)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
        seen = (column[None, :] <= row[:, None]) & (column < length)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums += tl.dot(weights.to(HALF), values, input_precision="ieee")
        top = higher
    store_tile(out + head * out_head, row, at, out_row, length, width, sums / total[:, None])
    tl.store(normalisers + head * length + row, top + tl.log2(total), mask=row < length)


@triton.jit
def _weights(queries, keys, normaliser, row, column, length, factor):
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
    seen = (column[None, :] <= row[:, None]) & (row < length)[:, None]
    return tl.exp2(tl.where(seen, scores - normaliser[:, None], float("-inf")))


@triton.jit
def attention_gradient_kernel(
    q, k, v, out, gradient, normalisers, q_gradient, k_gradient, v_gradient,
    length, width, scale, group,
    q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row, d_head, d_row,
    dq_head, dq_row,
    HALF: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The first half of the programs of an axis are for rows of q, the second for rows of k and v.

    k_gradient, v_gradient [T, heads, width]: a part for every head of q.
    """
    after_previous_kernel(EARLY)
    blocks = tl.num_programs(0) // 2
    head = tl.program_id(1).to(tl.int64)
    shared = head // group
    at = tl.arange(0, D)
    factor = scale * _LOG2_E
    q += head * q_head
    k += shared * k_head
    v += shared * v_head
    out += head * out_head
    gradient += head * d_head
    normalisers += head * length
    if tl.program_id(0) < blocks:
        block = blocks - 1 - tl.program_id(0)
        row = block * BLOCK + tl.arange(0, BLOCK)
        queries = load_tile(q, row, at, q_row, length, width, HALF)
        d = load_tile(gradient, row, at, d_row, length, width, HALF)
        o = load_tile(out, row, at, out_row, length, width, tl.float32)
        along = tl.sum(o * d.to(tl.float32), 1)
        normaliser = tl.load(normalisers + row, mask=row < length, other=0.0)
        sums = tl.zeros((BLOCK, D), tl.float32)
        for start in range(0, (block + 1) * BLOCK, BLOCK):
            column = start + tl.arange(0, BLOCK)
            keys = load_tile(k, column, at, k_row, length, width, HALF)
            values = load_tile(v, column, at, v_row, length, width, HALF)
            weights = _weights(queries, keys, normaliser, row, column, length, factor)
            moved = tl.dot(d, tl.trans(values), input_precision="ieee") - along[:, None]
            sums += tl.dot((weights * moved).to(HALF), keys, input_precision="ieee")
        store_tile(q_gradient + head * dq_head, row, at, dq_row, length, width, sums * scale)
    else:
        block = tl.program_id(0) - blocks
        column = block * BLOCK + tl.arange(0, BLOCK)
        keys = load_tile(k, column, at, k_row, length, width, HALF)
        values = load_tile(v, column, at, v_row, length, width, HALF)
        of_keys = tl.zeros((BLOCK, D), tl.float32)
        of_values = tl.zeros((BLOCK, D), tl.float32)
        for start in range(block * BLOCK, length, BLOCK):
            row = start + tl.arange(0, BLOCK)
            queries = load_tile(q, row, at, q_row, length, width, HALF)
            d = load_tile(gradient, row, at, d_row, length, width, HALF)
            o = load_tile(out, row, at, out_row, length, width, tl.float32)
            along = tl.sum(o * d.to(tl.float32), 1)
            normaliser = tl.load(normalisers + row, mask=row < length, other=0.0)
            weights = _weights(queries, keys, normaliser, row, column, length, factor)
            of_values += tl.dot(tl.trans(weights.to(HALF)), d, input_precision="ieee")
            moved = tl.dot(d, tl.trans(values), input_precision="ieee") - along[:, None]
            inner = (weights * moved).to(HALF)
            of_keys += tl.dot(tl.trans(inner), queries, input_precision="ieee")
        part = head * width
        together = tl.num_programs(1) * width
        store_tile(k_gradient + part, column, at, together, length, width, of_keys * scale)
        store_tile(v_gradient + part, column, at, together, length, width, of_values)
