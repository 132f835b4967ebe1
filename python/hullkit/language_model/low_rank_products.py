# SPDX-License-Identifier: Apache-2.0
"""The products of low-rank factors beside K linear layers, for functions that also run the layers.

    inner = scale x a^T;  y += inner b^T
    d_b = d^T inner;  d_inner = scale d b;  d_a = d_inner^T x;  d_x += d_inner a

x (K, T, D), y and d (K, T, E), a (K, R, D), b (K, E, R). All that needs neither y nor d_x runs
beside a block, which is where the layer's own product goes. Nothing here is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim._tensor_table import uses_triton
from .branches import beside

_LARGEST_RANK = 64  # of the kernels
# Kernels were found to be faster than torch's products at this rank, and at lower ones where all
# slots together have so many columns (bench/ops/lora_products.py).
_PAYING_RANK, _PAYING_COLUMNS = 16, 1 << 14
_PROGRAMS = 256  # keep a GPU busy


class Thin(NamedTuple):
    """inner or d_inner, (K, T, R) as x is; with kernels [K, parts, T, R] in float32."""

    values: Tensor
    dtype: torch.dtype  # x's, and of the inputs of products
    by_kernels: bool


@contextmanager
def low_rank_inner(
    x: Tensor, a: Tensor, scale: float, backend: str | None = None
) -> Iterator[Thin]:
    """scale x a^T, which has its value when the block ends.

    x (K, T, D): rows without gaps. a (K, R, D): contiguous.
    backend: "triton" takes CPU tensors too, in Triton's interpreter.
    """
    if not _uses_kernels(x, a, backend):
        yield Thin(_product(x, a.to(x.dtype).mT, scale), x.dtype, False)
        return
    slots, rows, columns = x.shape
    rank = a.shape[1]
    parts, length = _parts(x, rank)
    count = parts.shape[1]
    programs = (_blocks(rows, columns)[0] * count, slots)
    sizes = (rows, columns, rank, x.stride(0), x.stride(1), count, length, scale)
    arguments = (x, a, parts, *sizes)
    work = partial(_launch, "low_rank_inner", programs, arguments, rank, x.dtype)
    with beside(x.device, work):
        yield Thin(parts, x.dtype, True)


def low_rank_add_(y: Tensor, b: Tensor, inner: Thin) -> Tensor:
    """y += inner b^T; returns inner (K, T, R) as y is. y (K, T, E), b (K, E, R): contiguous."""
    if not inner.by_kernels:
        y.baddbmm_(inner.values, b.to(inner.dtype).mT)
        return inner.values
    slots, rows, columns = y.shape
    rank, count = b.shape[2], inner.values.shape[1]
    down, across = _blocks(rows, columns)
    whole = y.new_empty(slots, rows, rank)
    arguments = (y, b, inner.values, whole, rows, columns, rank, count)
    programs = (down * across, slots)
    _launch("low_rank_add", programs, arguments, rank, inner.dtype, PARTS=_loaded(count))
    return whole


@contextmanager
def low_rank_gradients(
    d: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    inner: Tensor,
    scale: float,
    d_a: Tensor | None,
    d_b: Tensor | None,
    backend: str | None = None,
) -> Iterator[Thin]:
    """scale d b. It, d_a and d_b have their values when the block ends. None is left out.

    d (K, T, E), the gradient of y: rows without gaps. d_a, d_b: contiguous, overwritten.
    """
    if not _uses_kernels(x, a, backend):
        if d_b is not None:
            _put(d_b.view(b.shape), d.mT, inner)
        d_inner = _product(d, b.to(d.dtype), scale)
        if d_a is not None:
            _put(d_a.view(a.shape), d_inner.mT, x)
        yield Thin(d_inner, d.dtype, False)
        return
    parts, length = _parts(d, a.shape[1])
    work = partial(_gradients, d, x, b, inner, parts, length, scale, d_a, d_b)
    with beside(x.device, work):
        yield Thin(parts, d.dtype, True)


def _gradients(
    d: Tensor,
    x: Tensor,
    b: Tensor,
    inner: Tensor,
    parts: Tensor,
    length: int,
    scale: float,
    d_a: Tensor | None,
    d_b: Tensor | None,
) -> None:
    slots, rows, wide = d.shape
    rank, count = b.shape[2], parts.shape[1]
    down, across = _blocks(rows, wide)
    programs = (down * count + across * (d_b is not None), slots)
    sizes = (rows, wide, rank, d.stride(0), d.stride(1), count, length, scale)
    arguments = (d, b, inner, parts, b if d_b is None else d_b, *sizes)
    of_b = d_b is not None
    _launch("low_rank_gradient_b", programs, arguments, rank, d.dtype, OF_B=of_b)
    if d_a is not None:
        columns = x.shape[2]
        programs = (_blocks(rows, columns)[1], slots)
        of_a = (x, parts, d_a, rows, columns, rank, x.stride(0), x.stride(1), count)
        _launch("low_rank_gradient_a", programs, of_a, rank, d.dtype, PARTS=_loaded(count))


def low_rank_gradient_x_(d_x: Tensor, a: Tensor, d_inner: Thin) -> None:
    """d_x += d_inner a. d_x (K, T, D): contiguous."""
    if not d_inner.by_kernels:
        _put(d_x, d_inner.values, a.to(d_inner.dtype), add=True)
        return
    slots, rows, columns = d_x.shape
    rank, count = a.shape[1], d_inner.values.shape[1]
    down, across = _blocks(rows, columns)
    programs = (down * across, slots)
    arguments = (d_x, a, d_inner.values, rows, columns, rank, count)
    loaded = _loaded(count)
    _launch("low_rank_gradient_x", programs, arguments, rank, d_inner.dtype, PARTS=loaded)


def _uses_kernels(x: Tensor, a: Tensor, backend: str | None) -> bool:
    if not uses_triton("x", x.device, backend) or a.shape[-2] > _LARGEST_RANK:
        return False
    slots, rank, columns = a.shape
    wide = rank < _PAYING_RANK and slots * columns >= _PAYING_COLUMNS
    return backend == "triton" or rank == _PAYING_RANK or wide


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a @ b of batches of matrices."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0.0, alpha=scale)


def _put(total: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """total = a @ b; with `add` total += a @ b."""
    if total.dtype is a.dtype:
        total.baddbmm_(a, b, beta=1.0 if add else 0.0)
    elif add:
        total.add_(torch.bmm(a, b))
    else:
        total.copy_(torch.bmm(a, b))


# For the kernels.


def _launch(
    name: str,
    programs: tuple[int, int],
    arguments: tuple[Any, ...],
    rank: int,
    dtype: torch.dtype,
    **flags: Any,
) -> None:
    from ..triton_kernels.launch import launch

    tensor: Tensor = next(iter(arguments))
    kind = dtype if tensor.is_cuda else torch.float32  # the interpreter multiplies no bfloat16
    constants = {"HALF": kind, "R": max(16, 1 << (rank - 1).bit_length())}
    with torch.cuda.device_of(tensor):
        launch(name, programs, arguments, flags | constants)


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    """Blocks of the kernels, down and across."""
    from ..triton_kernels.low_rank import COLUMNS, ROWS

    return -(-rows // ROWS), -(-columns // COLUMNS)


def _parts(x: Tensor, rank: int) -> tuple[Tensor, int]:
    """Memory for the parts of sums over x's columns, and how many columns a part has."""
    from ..triton_kernels.low_rank import COLUMNS, MOST_PARTS

    slots, rows, columns = x.shape
    down, blocks = _blocks(rows, columns)
    wanted = min(blocks, MOST_PARTS, max(1, _PROGRAMS // (slots * down)))
    length = -(-blocks // wanted) * COLUMNS
    count = -(-columns // length)
    return x.new_empty(slots, count, rows, rank, dtype=torch.float32), length


def _loaded(count: int) -> int:
    """How many parts a program loads at once: a constant, of which there are few."""
    from ..triton_kernels.low_rank import MOST_PARTS

    return 1 if count == 1 else MOST_PARTS
