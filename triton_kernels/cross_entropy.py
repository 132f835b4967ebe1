"""The mean next-token cross entropy of logits [T, V], and its gradient written over them.

A program for every row. Row t is scored against labels[t + 1]; the last one, and those whose label
is -100, are not scored: their loss and gradient are 0.
"""

import triton
import triton.language as tl

BLOCK_SIZE = 2048

IGNORED = tl.constexpr(-100)


@triton.jit
def _label(labels, row, rows):
    return tl.load(labels + row + 1, mask=row + 1 < rows, other=IGNORED)


@triton.jit
def _origin(highest):
    """What exponents are taken from: not from an infinity, inf - inf would make NaN of -inf's 0."""
    return tl.where(tl.abs(highest) == float("inf"), 0.0, highest)


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_kernel(
    logits, labels, losses, normalisers, rows, stride, columns,
    MATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [T], normalisers [T]: log sum exp of a row. Nothing is written for unscored rows."""
    row = tl.program_id(0).to(tl.int64)
    label = _label(labels, row, rows)
    if label != IGNORED:
        at = logits + row * stride
        top = tl.full((BLOCK,), float("-inf"), MATH)
        total = tl.zeros((BLOCK,), MATH)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(at + column, mask=column < columns, other=float("-inf")).to(MATH)
            higher = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
            origin = _origin(higher)
            total = total * tl.exp(top - origin) + tl.exp(x - origin)
            top = higher
        highest = tl.max(top)
        origin = _origin(highest)
        normaliser = tl.log(tl.sum(total * tl.exp(top - origin))) + origin
        tl.store(normalisers + row, normaliser)
        tl.store(losses + row, normaliser - tl.load(at + label).to(MATH))


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_gradient_kernel(
    logits, labels, normalisers, scale, rows, stride, columns,
    MATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale [1]: the gradient of the sum of all losses."""
    row = tl.program_id(0).to(tl.int64)
    label = _label(labels, row, rows)
    at = logits + row * stride
    dtype = logits.dtype.element_ty
    if label != IGNORED:
        normaliser = tl.load(normalisers + row)
        factor = tl.load(scale).to(MATH)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            x = tl.load(at + column, mask=inside, other=float("-inf")).to(MATH)
            gradient = tl.exp(x - normaliser) - tl.where(column == label, 1.0, 0.0)
            tl.store(at + column, (gradient * factor).to(dtype), mask=inside)
    else:
        zero = tl.zeros((BLOCK,), dtype)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(at + column, zero, mask=column < columns)
