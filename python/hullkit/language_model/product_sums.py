# SPDX-License-Identifier: Apache-2.0
"""Sums of products, for each of K slots and for several results at once.

    result[k] = sum over terms of rows[k] factor[k]^T, + bias
    result[k] = sum over terms of rows[k] factor[k]               with `transposed`

A linear layer with a low-rank part is such a sum of two terms, and so is its input's gradient. The
kernel (csrc/products/product_sums_cuda.cu) adds a thin product to a large one as one more step of
its sum: nothing is written in between, read again, or rounded twice. Beside an input's gradient it
computes those of the low-rank factors that read the input. It runs on GPUs of compute capability
9.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import kernels

_MOST_WASTE = 1.5  # rows of tiles for each row of a slot
# A long sum for each element of few tiles leaves multiprocessors idle; cuBLAS splits it (H100).
_FEW_TILES, _LONG = 88, 6000
# From so many multiply-adds on, cuBLAS's large product saves more time than a product of its own
# costs whose rank is below this (H100).
_LARGE, _THINNEST = 150e9, 16


class Term(NamedTuple):
    """rows (K, T, D). factor (K, E, D), or (K, D, E) with `transposed`.

    A factor (1, ...) serves all slots.
    """

    rows: Tensor
    factor: Tensor


class ProductSum(NamedTuple):
    """One result's terms, and its bias (E,)."""

    terms: Sequence[Term]
    bias: Tensor | None = None


class FactorGradients(NamedTuple):
    """d_a[k] = d_inner[k]^T x[k] of factors that read one x (K, T, D).

    factors: of each d_inner (K, T, R), and d_a (K, R, D), which is overwritten.
    """

    x: Tensor
    factors: Sequence[tuple[Tensor, Tensor]]


class _Matrix(NamedTuple):
    """One matrix as the kernel reads it: csrc/include/hullkit/product_sums.h."""

    address: int
    slots: int
    rows: int
    columns: int
    slot_stride: int
    row_stride: int
    bias: int = 0


if kernels.LAYOUTS["ProductMatrix"] != _Matrix._fields:
    raise ImportError(
        f"ProductMatrix: expected the fields {kernels.LAYOUTS['ProductMatrix']} of the compiled "
        f"module, got {_Matrix._fields}: reinstall hullkit"
    )


def product_sums_take(
    sums: Sequence[ProductSum], transposed: bool, backend: str | None = None
) -> bool:
    """Whether `product_sums` computes these, and as fast as products one by one.

    All sums have equally many terms; the i-th terms of all have one depth D.

    backend: "triton" takes CPU tensors too, which torch multiplies.
    """
    rows = sums[0].terms[0].rows
    if not rows.is_cuda:
        return backend == "triton"
    if not kernels.product_sums_usable(rows.device):
        return False
    depths = [[term.rows.shape[2] for term in own.terms] for own in sums]
    if any(other != depths[0] for other in depths):
        return False
    if len(sums) > kernels.MOST_PRODUCT_RESULTS:
        return False
    if len(sums) * len(depths[0]) > kernels.MOST_PRODUCT_TERMS:
        return False
    if not all(_fits(t) for own in sums for term in own.terms for t in term):
        return False
    widths = [_width(own, transposed) for own in sums]
    biases = [own.bias for own in sums if own.bias is not None]
    if any(width % 8 for width in widths) or any(not _is_row(bias) for bias in biases):
        return False
    slots, length = rows.shape[:2]
    if min(-(-length // n) * n for n in kernels.PRODUCT_TILE_ROWS) > _MOST_WASTE * length:
        return False
    across = sum(-(-width // kernels.PRODUCT_TILE_COLUMNS) for width in widths)
    work = slots * length * sum(widths) * sum(depths[0])
    if work > _LARGE and min(depths[0]) < _THINNEST:
        return False
    tiles = across * -(-length // kernels.PRODUCT_TILE_ROWS[0]) * slots
    return tiles >= _FEW_TILES or sum(depths[0]) <= _LONG


def gradients_take(of: FactorGradients) -> bool:
    """Whether `product_sums` computes these, beside sums that it takes."""
    layouts = {(d_a.shape, d_a.stride(), d_a.dtype) for _, d_a in of.factors}
    if len(layouts) != 1 or len(of.factors) > kernels.MOST_PRODUCT_GRADIENTS:
        return False
    if not of.x.is_cuda:
        return True
    [(_, strides, dtype)] = layouts
    kind = dtype in (torch.float32, torch.bfloat16) and strides[-1] == 1
    return kind and all(_fits(t) for t in (of.x, *(d_inner for d_inner, _ in of.factors)))


def product_sums(
    sums: Sequence[ProductSum],
    transposed: bool,
    out: Sequence[Tensor] | None = None,
    gradients: FactorGradients | None = None,
) -> list[Tensor]:
    """Results (K, T, E), where `product_sums_take` holds.

    out: memory for them, whose rows begin at multiples of 16 bytes.
    gradients: computed beside them, where `gradients_take` holds. Only with `transposed`.

    Sums are in float32 and rounded once. A slot's bits depend on no other slot.

    Cost: the multiply-adds of all terms. Each factor and all rows are read once, and once more for
    each 96 to 208 rows and each 128 columns of a result, mostly from the GPU's cache.
    """
    if gradients is not None and not transposed:
        raise ValueError("gradients: expected them only with transposed=True, got transposed=False")
    first = sums[0].terms[0].rows
    shape = first.shape[:2]
    results = out or [first.new_empty(*shape, _width(own, transposed)) for own in sums]
    if not first.is_cuda:
        for result, own in zip(results, sums, strict=True):
            result.copy_(_plain(own, transposed))
        if gradients is not None:
            for d_inner, d_a in gradients.factors:
                d_a.copy_(d_inner.float().mT @ gradients.x.float())
        return list(results)
    matrices = []
    for result, own in zip(results, sums, strict=True):
        bias = 0 if own.bias is None else own.bias.data_ptr()
        matrices.append(_matrix(result)._replace(bias=bias))
        for rows, factor in own.terms:
            matrices += [_matrix(factor), _matrix(rows)]
    count, wide = 0, False
    if gradients is not None:
        matrices.append(_matrix(gradients.x))
        for d_inner, d_a in gradients.factors:
            matrices += [_matrix(d_inner), _matrix(d_a)]
            count, wide = count + 1, d_a.dtype is torch.float32
    table = torch.tensor(matrices, dtype=torch.int64, device="cpu")
    kernels.product_sums_cuda(
        table, len(sums), len(sums[0].terms), transposed, count, wide, first.device
    )
    return list(results)


def _plain(own: ProductSum, transposed: bool) -> Tensor:
    products = (
        rows.float() @ (factor if transposed else factor.mT).float() for rows, factor in own.terms
    )
    total = torch.stack(list(products)).sum(0)
    return total if own.bias is None else total + own.bias.float()


def _width(own: ProductSum, transposed: bool) -> int:
    """Columns of the result."""
    return own.terms[0].factor.shape[2 if transposed else 1]


def _fits(matrix: Tensor) -> bool:
    """Whether copies of boxes take the matrix: 16 bytes at a time."""
    of = _matrix(matrix)
    return (
        matrix.dtype is torch.bfloat16
        and matrix.stride(2) == 1
        and of.address % 16 == 0
        and of.row_stride % 8 == 0
        and of.slot_stride % 8 == 0
        and of.row_stride >= of.columns
        and of.slot_stride >= of.rows * of.row_stride
    )


def _is_row(bias: Tensor) -> bool:
    return bias.dtype is torch.bfloat16 and bias.ndim == 1 and bias.is_contiguous()


def _matrix(matrix: Tensor) -> _Matrix:
    slots, rows, columns = matrix.shape
    row_stride = matrix.stride(1) if rows > 1 else -(-columns // 8) * 8
    slot_stride = matrix.stride(0) if slots > 1 else rows * row_stride
    return _Matrix(matrix.data_ptr(), slots, rows, columns, slot_stride, row_stride)
