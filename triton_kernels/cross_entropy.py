# SPDX-License-Identifier: Apache-2.0
"""The cross entropy of logits [T, V] with targets [T], and its gradient written over them.

A program for every row. Rows whose target is -100 are not scored: their loss and gradient are 0.
The loss of another target without a logit is NaN.
"""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel

BLOCK_SIZE = 2048

IGNORED = tl.constexpr(-100)


@triton.jit
def _origin(highest):
    """The number that exponents are relative to: 0 for an infinity, since inf - inf is NaN."""
    return tl.where(tl.abs(highest) == float("inf"), 0.0, highest)


@triton.jit
def _summed(top, total, x):
    """x among the exponentials that each lane has summed: their maximum, and the sum over it."""
    higher = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
    origin = _origin(higher)
    return higher, total * tl.exp(top - origin) + tl.exp(x - origin)


@triton.jit
def _gradient(x, column, target, normaliser, factor):
    return (tl.exp(x - normaliser) - tl.where(column == target, 1.0, 0.0)) * factor


# Whole blocks go without a mask: with one, no thread loads more than an element at a time.


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, normalisers, stride, columns, MATH: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """losses [T], normalisers [T]: log sum exp of a row. Nothing is written for unscored rows."""
    after_previous_kernel(EARLY)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target != IGNORED:
        at = logits + row * stride
        top = tl.full((BLOCK,), float("-inf"), MATH)
        total = tl.zeros((BLOCK,), MATH)
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            x = tl.load(at + start + tl.arange(0, BLOCK)).to(MATH)
            top, total = _summed(top, total, x)
        column = whole + tl.arange(0, BLOCK)
        x = tl.load(at + column, mask=column < columns, other=float("-inf")).to(MATH)
        top, total = _summed(top, total, x)
        highest = tl.max(top)
        origin = _origin(highest)
        normaliser = tl.log(tl.sum(total * tl.exp(top - origin))) + origin
        tl.store(normalisers + row, normaliser)
        known = (target >= 0) & (target < columns)
        tl.store(losses + row, normaliser - tl.load(at + target, known, float("nan")).to(MATH))


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
    dtype = logits.dtype.element_ty
    whole = columns // BLOCK * BLOCK
    last = whole + tl.arange(0, BLOCK)
    inside = last < columns
    if target != IGNORED:
        normaliser = tl.load(normalisers + row)
        factor = tl.load(scale + row).to(MATH)
        for start in range(0, whole, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(at + column).to(MATH)
            tl.store(at + column, _gradient(x, column, target, normaliser, factor).to(dtype))
        x = tl.load(at + last, mask=inside, other=float("-inf")).to(MATH)
        gradient = _gradient(x, last, target, normaliser, factor).to(dtype)
        tl.store(at + last, gradient, mask=inside)
    else:
        zero = tl.zeros((BLOCK,), dtype)
        for start in range(0, whole, BLOCK):
            tl.store(at + start + tl.arange(0, BLOCK), zero)
        tl.store(at + last, zero, mask=inside)


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
