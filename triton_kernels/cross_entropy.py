# SPDX-License-Identifier: Apache-2.0
"""The cross entropy of logits [T, V] with targets [T], and its gradient written over them.

A program for every row. Rows whose target is -100 are not scored: their loss and gradient are 0.
The loss of another target without a logit is NaN.

A gradient that is wanted at once is written by the kernel of the loss. Its programs have many
threads, so that few rows are under way and a row is still in the L2 cache when it is read again.
"""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel

BLOCK_SIZE = 2048
LARGE_BLOCK_SIZE, LARGE_NUM_WARPS = 8192, 16  # of the loss with its gradient (H100)

IGNORED = tl.constexpr(-100)


@triton.jit
def _origin(highest):
    """The number that exponents are relative to: 0 for an infinity, since inf - inf is NaN."""
    return tl.where(tl.abs(highest) == float("inf"), 0.0, highest)


@triton.jit
def _summed(top, total, x, GROUP: tl.constexpr):
    """x among the exponentials that each lane has summed: their maximum, and the sum over it.

    A lane takes GROUP neighbours at once, so that few exponentials go into moving its maximum. A
    NaN may be missing from the maximum, but not from the sum.
    """
    groups = tl.reshape(x, (x.shape[0] // GROUP, GROUP))
    higher = tl.maximum(top, tl.max(groups, 1))
    origin = _origin(higher)
    terms = tl.exp(groups - origin[:, None])
    return higher, total * tl.exp(top - origin) + tl.sum(terms, 1)


@triton.jit
def _gradient(x, column, target, normaliser, factor):
    return (tl.exp(x - normaliser) - tl.where(column == target, 1.0, 0.0)) * factor


# Whole blocks go without a mask: with one, no thread loads more than an element at a time.


@triton.jit
def _write_gradient(at, target, normaliser, factor, columns, BLOCK: tl.constexpr):
    """Over the logits of a row.

    What is done with leaves the L2 cache first, so that rows under way stay in it until they are
    read again (H100, 1024 rows of 128256 logits: 0.31 -> 0.25 ms).
    """
    dtype = at.dtype.element_ty
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(at + column, eviction_policy="evict_first").to(normaliser.dtype)
        gradient = _gradient(x, column, target, normaliser, factor).to(dtype)
        tl.store(at + column, gradient, eviction_policy="evict_first")
    column = whole + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(at + column, mask=inside, other=float("-inf")).to(normaliser.dtype)
    gradient = _gradient(x, column, target, normaliser, factor).to(dtype)
    tl.store(at + column, gradient, mask=inside)


@triton.jit
def _write_zeros(at, columns, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), at.dtype.element_ty)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(at + start + tl.arange(0, BLOCK), zero)
    column = whole + tl.arange(0, BLOCK)
    tl.store(at + column, zero, mask=column < columns)


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, of_rows, stride, columns, MATH: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """losses [T] is written where rows are scored.

    of_rows [T]: gets log sum exp of each scored row. With GRADIENT it holds the gradient of each
    row's loss, and the kernel writes that of the logits.
    """
    after_previous_kernel(EARLY)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    at = logits + row * stride
    if target != IGNORED:
        known = (target >= 0) & (target < columns)
        own = tl.load(at + target, known, float("nan")).to(MATH)  # before it is written to
        # As many as a thread loads at a time.
        group: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
        top = tl.full((BLOCK // group,), float("-inf"), MATH)
        total = tl.zeros((BLOCK // group,), MATH)
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            x = tl.load(at + start + tl.arange(0, BLOCK)).to(MATH)
            top, total = _summed(top, total, x, group)
        column = whole + tl.arange(0, BLOCK)
        x = tl.load(at + column, mask=column < columns, other=float("-inf")).to(MATH)
        top, total = _summed(top, total, x, group)
        highest = tl.max(top)
        origin = _origin(highest)
        normaliser = tl.log(tl.sum(total * tl.exp(top - origin))) + origin
        tl.store(losses + row, normaliser - own)
        if GRADIENT:
            factor = tl.load(of_rows + row).to(MATH)
            _write_gradient(at, target, normaliser, factor, columns, BLOCK)
        else:
            tl.store(of_rows + row, normaliser)
    elif GRADIENT:
        _write_zeros(at, columns, BLOCK)


@triton.jit
def cross_entropy_gradient_kernel(
    logits, targets, normalisers, scale, stride, columns, MATH: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """scale [T]: the gradient of each row's loss."""
    after_previous_kernel(EARLY)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    at = logits + row * stride
    if target != IGNORED:
        normaliser = tl.load(normalisers + row)
        factor = tl.load(scale + row).to(MATH)
        _write_gradient(at, target, normaliser, factor, columns, BLOCK)
    else:
        _write_zeros(at, columns, BLOCK)


@triton.jit
def rescale_kernel(values, scale, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """values times scale [1], in place. A scale of 1, the usual one, costs a launch and no more.

    Programs work through many blocks each: so few that they begin in no time.
    """
    after_previous_kernel(EARLY)
    factor = tl.load(scale)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for _ in range(0, tl.cdiv(size, step)):
            inside = at < size
            x = tl.load(values + at, mask=inside)
            tl.store(values + at, (x.to(factor.dtype) * factor).to(x.dtype), mask=inside)
            at += step
