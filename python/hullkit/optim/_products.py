# SPDX-License-Identifier: Apache-2.0
"""Adam updates of matrices whose gradients are products a^T b, which are never written to memory.

The kernel (csrc/optim/adam_product_cuda.cu) computes a tile of the product and updates the tile's
parameters with it. The results have the bits of a product that is rounded to bfloat16 and of
`adam_chunks_` after it, but for the order in which the product's terms are added up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._tensors import HALVES
from ..native import kernels
from ._record import ProductFactors
from ._tensor_table import TensorTable

# Elements of a matrix. Passes of smaller ones do not fill a GPU: they lose less to updates on half
# of the processors, which take longer, beside them. (H100: GPT-2 and SmolLM2-135M gain by it,
# Qwen2.5-0.5B and larger models lose.)
_SMALL = 1 << 22
# A longer product no longer waits for memory. cuBLAS's, on all warps, then saves more than the
# gradient's way to memory and back costs (bench/ops/adam_products.py).
_MOST_TOKENS = 512
_ALIGNMENT = 16  # bytes of one access
_MULTIPLE = 8  # both sides of a matrix


def takes_products(param: Tensor, moments: Sequence[Tensor], copy: Tensor | None) -> bool:
    """Whether the kernel updates this parameter, which may have a bfloat16 copy."""
    if param.ndim != 2 or param.numel() >= 1 << 32:
        return False
    if min(param.shape) < kernels.PRODUCT_TILE:  # most of a tile would be empty
        return False
    if any(size % _MULTIPLE for size in param.shape):
        return False
    if param.dtype not in (torch.float32, *HALVES):
        return False
    if (copy is None) != (param.dtype is torch.bfloat16):
        return False
    wanted = torch.bfloat16 if param.dtype in HALVES else torch.float32
    tensors = [param, *moments, *([] if copy is None else [copy])]
    return (
        all(moment.dtype is wanted for moment in moments)
        and all(t.is_contiguous() and t.data_ptr() % _ALIGNMENT == 0 for t in tensors)
        and kernels.adam_product_usable(param.device)
    )


def is_product(a: Tensor, b: Tensor, gradient: Tensor) -> bool:
    """Whether the kernel computes this gradient, a^T b, as it is, and in less time than others."""
    return len(a) <= _MOST_TOKENS and all(t.dtype is torch.bfloat16 for t in (a, b, gradient))


def aligned(factor: Tensor) -> Tensor:
    """The factor as the kernel reads it."""
    whole = factor.stride(1) == 1 and factor.stride(0) % _MULTIPLE == 0
    if whole and factor.data_ptr() % _ALIGNMENT == 0:
        return factor
    return factor.clone(memory_format=torch.contiguous_format)


def factors_of(a: Tensor, b: Tensor) -> ProductFactors:
    """a [T, M] and b [T, N], both `aligned`."""
    strides = a.stride(0), b.stride(0)
    return ProductFactors(a.data_ptr(), b.data_ptr(), *strides, len(a), b.shape[1])


def product_chunks(shapes: Sequence[tuple[int, ...]], first: int, device: torch.device) -> Tensor:
    """[programs, 4] int32 on the device, as csrc/include/hullkit/adam_product.h has them.

    shapes: of the matrices in rows first, first + 1, ... of a table.
    """
    tile = kernels.PRODUCT_TILE
    tiles = [-(-rows // tile) * -(-columns // tile) for rows, columns in shapes]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if max(rows * columns for rows, columns in shapes) < _SMALL:
        processors = max(1, processors // 2)
    chunks = spread(tiles, processors)
    rows = [(first + row, *chunk) for row, *chunk in chunks]
    return torch.tensor(rows, dtype=torch.int32, device="cpu").to(device)


def spread(tiles: Sequence[int], processors: int) -> list[tuple[int, int, int, int]]:
    """Each program's matrix, first tile, number of tiles, and step from tile to tile.

    A processor runs one program at a time. So there are no more programs than processors, if each
    matrix can do with one, and the most tiles of a program are as few as that allows.
    """
    most = -(-sum(tiles) // processors)
    while sum(-(-count // most) for count in tiles) > max(processors, len(tiles)):
        most += 1
    chunks = []
    for matrix, count in enumerate(tiles):
        programs = -(-count // most)
        for i in range(programs):
            chunks.append((matrix, i, -(-(count - i) // programs), programs))
    return chunks


def adam_product_chunks_(
    table: TensorTable,
    chunks: Tensor,
    factors: Tensor,
    record: Tensor,
    coefficients: Tensor,
    param_dtype: torch.dtype,
    stochastic_rounding: bool,
    copies: Tensor | None,
) -> None:
    """The updates of these chunks: coefficients.shape[1] of them, or the record's limit.

    factors [T, 6] int64: a ProductFactors for each row of the table. The record's options have no
    weight decay, sign or factor. copies [T] int64: where bfloat16 copies go; None for bfloat16.
    """
    kernels.adam_product_cuda(
        table.table, factors, record, chunks, coefficients, copies, param_dtype, stochastic_rounding
    )
