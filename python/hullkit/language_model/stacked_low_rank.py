"""Low-rank factors of K slots: y += s (x A^T) B^T for every slot at once, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..optim._tensor_table import uses_triton

_PROGRAMS = 264  # twice the processors of a large GPU: as many as run at once
_MOST_PARTS = 8  # of a sum that is split
_LEAST_SPAN = 256  # columns of a part


def add_low_rank_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, *, backend: str | None = None
) -> Tensor:
    """y += scale (x a^T) b^T in place, for each of K slots.

    Args:
        y: (K, T, O), written. x: (K, T, I), of the same dtype: float32, bfloat16 or float16.
        a: (K, R, I), b: (K, O, R), floating. Products take them in y's dtype; sums are in float32.
        backend: "triton" takes CPU tensors too, in Triton's interpreter.

    Returns:
        x a^T (K, T, R), which `low_rank_gradients_` takes.
    """
    if not uses_triton("x", x.device, backend):
        h = torch.bmm(x, a.to(x.dtype).transpose(1, 2))
        y.baddbmm_(h, b.to(y.dtype).transpose(1, 2), alpha=scale)
        return h
    slots, length, width = x.shape
    rank = a.shape[1]
    a, b = _by_rows(a), _by_rows(b)
    rows = 32 if slots * length >= 32 * _PROGRAMS else 16
    columns = 128 if rank <= 32 else 64
    programs = slots * -(-length // rows)
    num_parts = max(1, min(_PROGRAMS // programs, _MOST_PARTS, width // _LEAST_SPAN))
    span = -(-width // (num_parts * columns)) * columns
    num_parts = -(-width // span)
    parts = x.new_empty(num_parts, slots, length, rank, dtype=torch.float32)
    h = x.new_empty(slots, length, rank)
    _launch(
        "lora_shrink", (-(-length // rows), slots * num_parts),
        (x, a, parts, length, width, rank, span, slots, *x.stride()[:2], a.stride(0)),
        _constants(x, rank, rows, columns),
    )  # fmt: skip
    width = y.shape[2]
    rows = 64 if slots * length * width >= 64 * 128 * _PROGRAMS else 32
    columns = 128 if rows == 64 else 64
    _launch(
        "lora_expand", (-(-length // rows), slots * -(-width // columns)),
        (parts, b, y, h, length, width, rank, num_parts, slots, scale)
        + (b.stride(0), *y.stride()[:2]),
        _constants(x, rank, rows, columns),
    )  # fmt: skip
    return h


def low_rank_gradients_(
    d: Tensor,
    x: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    d_a: Tensor,
    d_b: Tensor,
    d_x: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """Gradients of `add_low_rank_` for d = dL/dy (K, T, O) and its result h.

        d_b = scale d^T h;  d_h = scale d b;  d_a = d_h^T x;  d_x += d_h a

    d_a and d_b have the shapes of a and b, rows without gaps, and any floating dtype; they are
    overwritten. d_x (K, T, I) is added to; None leaves it out.
    """
    if not uses_triton("x", x.device, backend):
        d_b.copy_(torch.bmm(d.transpose(1, 2), h).mul_(scale))
        d_h = torch.bmm(d, b.to(d.dtype)).mul_(scale)
        d_a.copy_(torch.bmm(d_h.transpose(1, 2), x))
        if d_x is not None:
            d_x.baddbmm_(d_h, a.to(d_x.dtype))
        return
    slots, length, width = d.shape
    rank = a.shape[1]
    a, b = _by_rows(a), _by_rows(b)
    d = d if d.stride(2) == 1 else d.contiguous()
    rows, columns = _tile(x, slots, width, rank)
    blocks = -(-width // columns)
    parts = x.new_empty(blocks, slots, length, rank, dtype=torch.float32)
    _launch(
        "lora_outer_gradient", (blocks, slots),
        (d, h, b, parts, d_b, length, width, rank, slots, scale)
        + (*d.stride()[:2], b.stride(0), d_b.stride(0)),
        _constants(x, rank, rows, columns),
    )  # fmt: skip
    d_h = parts.sum(0) if blocks > 1 else parts[0]
    width = x.shape[2]
    rows, columns = _tile(x, slots, width, rank)
    to = x if d_x is None else d_x
    _launch(
        "lora_inner_gradient", (-(-width // columns), slots),
        (x, d_h, a, to, d_a, length, width, rank)
        + (*x.stride()[:2], a.stride(0), *to.stride()[:2], d_a.stride(0)),
        _constants(x, rank, rows, columns) | {"OF_X": d_x is not None},
    )  # fmt: skip


def _by_rows(factor: Tensor) -> Tensor:
    """The factor with rows without gaps, as the kernels read it. Slots may lie apart."""
    whole = factor.stride(2) == 1 and factor.stride(1) == factor.shape[2]
    return factor if whole else factor.contiguous()


def _tile(x: Tensor, slots: int, width: int, rank: int) -> tuple[int, int]:
    """Rows and columns that a program of the gradients has at a time."""
    wide = slots * width >= 128 * _PROGRAMS and rank <= 32 and x.dtype is not torch.float32
    return (64 if rank <= 32 and x.dtype is not torch.float32 else 32), (128 if wide else 64)


def _constants(x: Tensor, rank: int, rows: int, columns: int) -> dict[str, Any]:
    half = x.dtype if x.is_cuda else torch.float32  # the interpreter multiplies no bfloat16
    inner = max(16, 1 << (rank - 1).bit_length())
    return {"HALF": half, "ROWS": rows, "COLUMNS": columns, "R": inner}


def _launch(
    name: str, programs: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    from ..triton_kernels.launch import launch

    tensor, *_ = arguments
    with torch.cuda.device_of(tensor):  # does nothing for a CPU tensor
        launch(name, programs, arguments, constants)
