# SPDX-License-Identifier: Apache-2.0
"""Products with low-rank factors, K of them at once: y + scale (x a^T) b^T, and its gradients.

    shrink: inner = scale x a^T             expand: y += inner b^T
    expand's gradients: d_b = d^T inner;    d_inner = scale d b
    shrink's gradients: d_a = d_inner^T x;  d_x += d_inner a

x (K, T, D), y and d (K, T, E), a (K, R, D), b (K, E, R). Slots of x, a and b may lie any distance
apart, and rows of x. A row, a slot's factor, and all of y, d and d_x have no gaps. There is no
autograd.

backend: "triton" takes CPU tensors too, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tensors import uses_triton

MOST_LAYERS = 3  # that read the same x, which a kernel has places for
_LARGEST_RANK = 64  # of the kernels
# Kernels were found to be faster than torch's products at this rank, and at lower ones where all
# slots together have so many columns (bench/ops/lora_products.py).
_PAYING_RANK, _PAYING_COLUMNS = 16, 1 << 14
_PROGRAMS = 256  # so many keep a GPU busy
# Columns of d at a time: the programs that read it first and those that read it again stay close
# enough for the L2 cache (H100: 0.35 for 0.56 ms at 8192 columns).
_NEAR_COLUMNS = 1536


class Shrunk(NamedTuple):
    """values: inner (K, T, R). With `in_parts` its float32 parts (K, PARTS, T, R), for kernels.

    finished: the caller's counters, if inner came of kernels that used them.
    """

    values: Tensor
    in_parts: bool
    finished: Tensor | None = None


class Inner(NamedTuple):
    """What `expand_gradients` needs of the forward half.

    values (K, T, R): scale x a^T. finished (MOST_LAYERS, K, >= blocks of rows): zeros in which
    kernels count, None without kernels.
    """

    values: Tensor
    finished: Tensor | None


class ExpandGradient(NamedTuple):
    """A layer's part in `expand_gradients`: d, its factor, and where d_b goes, if wanted."""

    d: Tensor
    b: Tensor
    inner: Inner
    d_b: Tensor | None


class ShrinkGradient(NamedTuple):
    """A layer's part in `shrink_gradients`: its factor, d_inner, and where d_a goes, if wanted."""

    a: Tensor
    d_inner: Tensor
    d_a: Tensor | None


def shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    scale: float,
    backend: str | None = None,
    counters: Tensor | None = None,
) -> list[Shrunk]:
    """inner of each factor a, at most MOST_LAYERS of one shape and distance between slots.

    counters: (MOST_LAYERS, K, >= blocks of rows) int32 zeros. With them no result is in parts.
    """
    if not _uses_kernels(x, factors[0], backend):
        return [Shrunk(_product(x, a.to(x.dtype).mT, scale), in_parts=False) for a in factors]
    slots, rows, columns = x.shape
    first = factors[0]
    rank = first.shape[1]
    down, _ = _blocks(rows, columns)
    count, length = _split(slots * down, columns, most=columns)
    made = []
    if counters is not None:
        made.append(x.new_empty(len(factors), slots, rows, rank))
    if counters is None or count > 1:
        of_parts = (len(factors), slots, count, rows, rank)
        made.append(x.new_empty(of_parts, dtype=torch.float32))
    inner, parts = made[0], made[-1]
    finished = x if counters is None else counters
    sizes = (rows, columns, rank, x.stride(0), x.stride(1), first.stride(0), count, length, scale)
    arguments = (x, *_padded(factors), parts, inner, finished, *sizes)
    whole = counters is not None
    flags = {"LAYERS": len(factors), "WHOLE": whole} | _constants(x, rank) | _most(count)
    _launch("low_rank_shrink", x, down * count, arguments, flags)
    return [Shrunk(own, in_parts=not whole, finished=counters) for own in inner]


def expand(y: Tensor, shrunk: Shrunk, b: Tensor) -> Inner:
    """y += inner b^T."""
    inner, in_parts, _ = shrunk
    if not in_parts:
        y.baddbmm_(inner, b.to(y.dtype).mT)
        return Inner(inner, None)
    slots, rows, wide = y.shape
    rank, count = b.shape[2], inner.shape[1]
    down, across = _blocks(rows, wide)
    values = y.new_empty(slots, rows, rank)
    finished = y.new_empty(MOST_LAYERS, slots, down, dtype=torch.int32)
    arguments = (y, b, inner, values, finished, rows, wide, rank, b.stride(0), count)
    flags = {"LAYERS": MOST_LAYERS} | _constants(y, rank) | _most(count)
    _launch("low_rank_expand", y, down * across, arguments, flags)
    return Inner(values, finished)


def expand_gradients(layers: Sequence[ExpandGradient], scale: float) -> list[Tensor]:
    """Each layer's d_inner (K, T, R), for its d: the gradient of y. Each d_b is overwritten.

    layers: at most MOST_LAYERS, of one shape but for E, and of one dtype. Their factors have one
        distance between slots, and so have their d_b. Either all have a d_b or none, and either all
        count or none. Calls that get the same counters must follow one another, as those on one
        stream do.
    """
    if layers[0].inner.finished is None:
        made = []
        for d, b, inner, d_b in layers:
            if d_b is not None:
                _put(d_b, d.mT, inner.values, fresh=True)
            made.append(_product(d, b.to(d.dtype), scale))
        return made
    d, b, inner, d_b = layers[0]
    slots, rows, rank = inner.values.shape
    wide = [own.d.shape[2] for own in layers]
    down, _ = _blocks(rows, rank)
    _, length = _split(slots * down, max(wide), most=_NEAR_COLUMNS)
    counts = [-(-columns // length) for columns in wide]
    parts = d.new_empty(slots, sum(counts), rows, rank, dtype=torch.float32)
    d_inner = d.new_empty(len(layers), slots, rows, rank)
    to = [own.b if own.d_b is None else own.d_b for own in layers]
    tensors = (
        [own.d for own in layers], [own.b for own in layers], [own.inner.values for own in layers],
        to,
    )  # fmt: skip
    arguments = (
        *(one for kind in tensors for one in _padded(kind)), parts, d_inner, inner.finished, rows,
        rank, *_padded(wide), b.stride(0), to[0].stride(0), length, scale,
    )  # fmt: skip
    flags = {"LAYERS": len(layers), "OF_B": d_b is not None}
    programs = down * sum(counts)
    if d_b is not None:
        programs += sum(_blocks(rows, columns)[1] for columns in wide)
    constants = flags | _constants(d, rank) | _most(max(counts))
    _launch("low_rank_expand_gradient", d, programs, arguments, constants)
    return list(d_inner)


def shrink_gradients(
    x: Tensor, layers: Sequence[ShrinkGradient], d_x: Tensor | None, fresh: bool,
    backend: str | None = None,
) -> None:  # fmt: skip
    """Each layer's d_a, overwritten, and what all of them add to d_x, if there is one.

    layers: at most MOST_LAYERS, of factors of one shape and distance between slots. Either all
    have a d_a or none. fresh: d_x has no value yet.
    """
    first = layers[0]
    if first.d_a is None and d_x is None:
        return
    if not _uses_kernels(x, first.a, backend):
        for a, d_inner, d_a in layers:
            if d_a is not None:
                _put(d_a, d_inner.mT, x, fresh=True)
            if d_x is not None:
                _put(d_x, d_inner, a.to(x.dtype), fresh)
                fresh = False
        return
    slots, rows, columns = x.shape
    rank = first.a.shape[1]
    down, across = _blocks(rows, columns)
    name, programs = "low_rank_shrink_gradient", across + down * across * (d_x is not None)
    if d_x is None and slots * across < _PROGRAMS:
        from ..triton_kernels.low_rank import FEW_COLUMNS

        name, programs = f"{name}_few", -(-columns // FEW_COLUMNS)
    to = [a if d_a is None else d_a for a, _, d_a in layers]
    targets = (*_padded(to), x if d_x is None else d_x)
    read = (x, *_padded([a for a, _, _ in layers]), *_padded([d for _, d, _ in layers]))
    sizes = (rows, columns, rank, x.stride(0), x.stride(1), first.a.stride(0), to[0].stride(0))
    flags = {
        "LAYERS": len(layers), "OF_A": first.d_a is not None, "OF_X": d_x is not None,
        "ADD": not fresh,
    } | _constants(x, rank)  # fmt: skip
    _launch(name, x, programs, (*read, *targets, *sizes), flags)


def _uses_kernels(x: Tensor, a: Tensor, backend: str | None) -> bool:
    if not uses_triton("x", x.device, backend) or a.shape[-2] > _LARGEST_RANK:
        return False
    slots, rank, columns = a.shape
    wide = rank < _PAYING_RANK and slots * columns >= _PAYING_COLUMNS
    return backend == "triton" or rank == _PAYING_RANK or wide


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a @ b of batches of matrices."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0.0, alpha=scale)


def _put(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total = a @ b; without `fresh` total += a @ b."""
    if total.dtype is a.dtype:
        total.baddbmm_(a, b, beta=0.0 if fresh else 1.0)
    elif fresh:
        total.copy_(torch.bmm(a, b))
    else:
        total.add_(torch.bmm(a, b))


def _padded(of_layers: Sequence[Any]) -> tuple[Any, ...]:
    """As many as a kernel has places for; those beyond the first ones are not read."""
    return (*of_layers, *[of_layers[0]] * (MOST_LAYERS - len(of_layers)))


def _launch(
    name: str, like: Tensor, programs: int, arguments: tuple[Any, ...], flags: dict[str, Any]
) -> None:
    """Programs for each slot of `like`."""
    from ..triton_kernels.launch import launch

    with torch.cuda.device_of(like):
        launch(name, (programs, like.shape[0]), arguments, flags)


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    """Blocks of the kernels, down and across."""
    from ..triton_kernels.low_rank import COLUMNS, ROWS

    return -(-rows // ROWS), -(-columns // COLUMNS)


def _split(programs: int, columns: int, most: int) -> tuple[int, int]:
    """The number of parts of a sum over columns, and each part's columns.

    most: so many columns a part, or about as many, where MOST_PARTS parts are enough for that.
    """
    from ..triton_kernels.low_rank import COLUMNS, MOST_PARTS

    blocks = -(-columns // COLUMNS)
    wanted = min(blocks, MOST_PARTS, max(-(-columns // most), _PROGRAMS // programs))
    length = -(-blocks // wanted) * COLUMNS
    return -(-columns // length), length


def _constants(x: Tensor, rank: int) -> dict[str, Any]:
    kind = x.dtype if x.is_cuda else torch.float32  # the interpreter multiplies no bfloat16
    return {"HALF": kind, "R": max(16, 1 << (rank - 1).bit_length())}


def _most(count: int) -> dict[str, int]:
    from ..triton_kernels.low_rank import MOST_PARTS

    return {"MOST": 1 if count == 1 else MOST_PARTS}
