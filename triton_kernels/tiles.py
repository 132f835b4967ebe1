# SPDX-License-Identifier: Apache-2.0
"""Blocks of a matrix [rows, columns] whose rows lie `stride` elements apart."""

import triton
import triton.language as tl


@triton.jit
def load_tile(base, row, column, stride, rows, columns, DTYPE: tl.constexpr):
    """The elements at `row` and `column`, two vectors of indices, in DTYPE; 0 outside."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    of = base + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(of, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def store_tile(base, row, column, stride, rows, columns, value):
    """Writes the elements that lie inside, in the dtype of the matrix."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    of = base + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(of, value.to(base.dtype.element_ty), mask=mask)
