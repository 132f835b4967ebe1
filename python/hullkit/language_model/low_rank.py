# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside a linear layer: y = base(x) + scale (x A^T) B^T, as PEFT's LoRA."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..optim._tensor_table import uses_triton
from .products import SharedInput
from .trials import random_linear, random_tensor, trial

_PARTS = ("base_layer", "lora_A", "lora_B")
_ROWS, _IN, _RANK, _OUT = 4, 6, 3, 5  # of a proof
_LARGEST_RANK = 64  # of the kernels
# Kernels were found to be faster than torch's products at this rank, and at lower ones where all
# slots together have so many columns (bench/ops/lora_products.py).
_PAYING_RANK, _PAYING_COLUMNS = 16, 1 << 14
_PROGRAMS = 256  # so many keep a GPU busy


class LowRank(NamedTuple):
    """The one active adapter of a module."""

    name: str
    scale: float


def proven_low_rank(module: Any) -> LowRank | None:
    """The adapter with which a module computes the formula; None if it was not found to.

    The module's own forward is tried with small random layers in the places of its own, so that
    no adapter is zero. Its flags and all else stay: dropout, other adapters, variants show.
    """
    if not all(part in module._modules for part in _PARTS):
        return None
    try:
        [name] = [n for n in module.active_adapters if n in module.lora_A]
        adapter = LowRank(name, float(module.scaling[name]))
        factors = module.lora_A[name], module.lora_B[name]
        layers = (*factors, module.base_layer)
        if any(type(layer) is not nn.Linear or is_watched(layer) for layer in layers):
            return None
        if any(layer.bias is not None for layer in factors):
            return None
        random = torch.Generator(device="cpu").manual_seed(0)
        sizes = (_IN, _OUT), (_IN, _RANK), (_RANK, _OUT)
        base, a, b = (random_linear(*size, random) for size in sizes)
        parts = (base, nn.ModuleDict({name: a}), nn.ModuleDict({name: b}))
        x = random_tensor(random, _ROWS, _IN)
        got = trial(module, x, dict(zip(_PARTS, parts, strict=True)))
        with torch.no_grad():
            wanted = base(x) + adapter.scale * b(a(x))
    except Exception:
        return None
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype is not wanted.dtype:
        return None
    # Sums of a few products of numbers of size 1; orders may differ.
    bound = 64.0 * torch.finfo(x.dtype).eps * (1.0 + abs(adapter.scale))
    return adapter if float((got - wanted).abs().max()) <= bound else None


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has replaced the module's forward, or is told of its calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    more = (module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(map(bool, (*hooks, *more)))


class Inner(NamedTuple):
    """What `low_rank_backward` needs of the forward half.

    values (K, T, R): scale x a^T. finished (K, blocks of rows): zeros in which kernels count, None
    without kernels.
    """

    values: Tensor
    finished: Tensor | None


class Gradients(NamedTuple):
    """Where `low_rank_backward` leaves gradients; None leaves one out.

    a, b: contiguous, overwritten. x (K, T, D): overwritten if `fresh`, else added to.
    """

    a: Tensor | None
    b: Tensor | None
    x: Tensor | None
    fresh: bool


def add_low_rank_(
    y: Tensor,
    x: Tensor,
    shared: SharedInput,
    a: Tensor,
    b: Tensor,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """y += scale (x a^T) b^T, with gradients for y, x, a and b. Returns y.

    y (..., E): contiguous, of no function that needs it for a gradient. x (..., D): the tensor that
    `share` returned with `shared`, of y's dtype.
    a (R, D), b (E, R); or a (K, R, D), b (K, E, R) for x (K, ..., D), each entry with its own.
    backend: "triton" takes CPU tensors too, in Triton's interpreter.

    Cost: R (D + E) multiply-adds for each row of x forwards, twice that backwards. Kernels read x
    and y once in each direction; the thin product between them stays small.
    """
    result: Tensor = _AddLowRank.apply(y, x, a, b, shared, scale, backend)  # type: ignore[no-untyped-call]
    return result


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        shared: SharedInput,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.scale, ctx.backend = shared, scale, backend
        inner = low_rank_forward_(*_entries(y, x, a, b), scale, backend)
        ctx.save_for_backward(x, *inner, a, b)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None, None]:
        if gradient is None:
            return None, None, None, None, None, None, None
        x, values, finished, a, b = ctx.saved_tensors
        _, of_x, of_a, of_b = ctx.needs_input_grad[:4]
        entries = _entries(gradient, x, a, b)
        d_a, d_b = (torch.empty_like(t) if of else None for t, of in ((a, of_a), (b, of_b)))
        d_x, fresh = None, False
        if of_x:
            total, fresh = ctx.shared.total(x.numel() // x.shape[-1], x.shape[-1], x.device)
            d_x = total.view(entries[1].shape)
        to = Gradients(d_a, d_b, d_x, fresh)
        with torch.autocast(x.device.type, enabled=False):
            low_rank_backward(*entries, Inner(values, finished), ctx.scale, to, ctx.backend)
        return gradient, None, d_a, d_b, None, None, None


def low_rank_forward_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, backend: str | None = None
) -> Inner:
    """y += inner b^T (K, T, E), where inner = scale x a^T (K, T, R). Without autograd.

    y (K, T, E), a (K, R, D), b (K, E, R): contiguous. x (K, T, D): rows without gaps.
    """
    forward = _forward if _uses_kernels(x, a, backend) else _plain_forward
    return forward(y, x, a, b, scale)


def low_rank_backward(
    d: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    inner: Inner,
    scale: float,
    to: Gradients,
    backend: str | None = None,
) -> None:
    """The gradients of `low_rank_forward_` for d (K, T, E): its y's.

    Calls with the same `inner` must follow one another, as those on one stream do.
    """
    backward = _backward if _uses_kernels(x, a, backend) else _plain_backward
    backward(d, x, a, b, inner, scale, to)


def _uses_kernels(x: Tensor, a: Tensor, backend: str | None) -> bool:
    if not uses_triton("x", x.device, backend) or a.shape[-2] > _LARGEST_RANK:
        return False
    slots, rank, columns = a.shape
    wide = rank < _PAYING_RANK and slots * columns >= _PAYING_COLUMNS
    return backend == "triton" or rank == _PAYING_RANK or wide


def _entries(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [K, T, E], x [K, T, D], a [K, R, D], b [K, E, R]; K = 1 for factors of all rows."""
    a, b = (factor if factor.ndim == 3 else factor[None] for factor in (a, b))
    wide = (t.reshape(len(a), -1, t.shape[-1]) for t in (y, x))
    y, x = (t if t.stride(-1) == 1 else t.contiguous() for t in wide)
    return y, x, a.contiguous(), b.contiguous()


def _plain_forward(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Inner:
    inner = _product(x, a.to(x.dtype).mT, scale)
    y.baddbmm_(inner, b.to(x.dtype).mT)
    return Inner(inner, None)


def _plain_backward(
    d: Tensor, x: Tensor, a: Tensor, b: Tensor, inner: Inner, scale: float, to: Gradients
) -> None:
    if to.b is not None:
        _put(to.b.view(b.shape), d.mT, inner.values, fresh=True)
    d_inner = _product(d, b.to(d.dtype), scale)
    if to.a is not None:
        _put(to.a.view(a.shape), d_inner.mT, x, fresh=True)
    if to.x is not None:
        _put(to.x, d_inner, a.to(d.dtype), to.fresh)


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


def _forward(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Inner:
    from ..triton_kernels.launch import launch

    slots, rows, columns = x.shape
    rank, wide = a.shape[1], y.shape[2]
    down, across = _blocks(rows, wide)
    count, length = _split(slots * down, columns)
    parts = x.new_empty(slots, count, rows, rank, dtype=torch.float32)
    inner = x.new_empty(slots, rows, rank)
    finished = x.new_empty(slots, down, dtype=torch.int32)
    constants = _constants(x, rank)
    with torch.cuda.device_of(x):
        sizes = (rows, columns, rank, x.stride(0), x.stride(1), count, length, scale)
        launch("low_rank_inner", (down * count, slots), (x, a, parts, *sizes), constants)
        outer = (y, b, parts, inner, finished, rows, wide, rank, count)
        launch("low_rank_add", (down * across, slots), outer, constants | _most(count))
    return Inner(inner, finished)


def _backward(
    d: Tensor, x: Tensor, a: Tensor, b: Tensor, inner: Inner, scale: float, to: Gradients
) -> None:
    from ..triton_kernels.launch import launch

    slots, rows, columns = x.shape
    rank, wide = a.shape[1], d.shape[2]
    down, across = _blocks(rows, wide)
    count, length = _split(slots * down, wide)
    parts = x.new_empty(slots, count, rows, rank, dtype=torch.float32)
    d_inner = torch.empty_like(inner.values)
    constants = _constants(x, rank)
    with torch.cuda.device_of(x):
        programs = (down * count + across * (to.b is not None), slots)
        tensors = (d, b, inner.values, parts, d_inner, inner.finished, b if to.b is None else to.b)
        outer = (rows, wide, rank, d.stride(0), d.stride(1), count, length, scale)
        flags = {"OF_B": to.b is not None} | constants | _most(count)
        launch("low_rank_gradient_b", programs, (*tensors, *outer), flags)
        if to.a is None and to.x is None:
            return
        _, across = _blocks(rows, columns)
        programs = (across + down * across * (to.x is not None), slots)
        targets = (a if to.a is None else to.a, x if to.x is None else to.x)
        sizes = (rows, columns, rank, x.stride(0), x.stride(1))
        flags = {"OF_A": to.a is not None, "OF_X": to.x is not None, "ADD": not to.fresh}
        flags |= constants
        launch("low_rank_gradient_a", programs, (x, a, d_inner, *targets, *sizes), flags)


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    """Blocks of the kernels, down and across."""
    from ..triton_kernels.low_rank import COLUMNS, ROWS

    return -(-rows // ROWS), -(-columns // COLUMNS)


def _split(programs: int, columns: int) -> tuple[int, int]:
    """The number of parts of a sum over columns, and each part's columns."""
    from ..triton_kernels.low_rank import COLUMNS, MOST_PARTS

    blocks = -(-columns // COLUMNS)
    wanted = min(blocks, MOST_PARTS, max(1, _PROGRAMS // programs))
    length = -(-blocks // wanted) * COLUMNS
    return -(-columns // length), length


def _constants(x: Tensor, rank: int) -> dict[str, Any]:
    kind = x.dtype if x.is_cuda else torch.float32  # the interpreter multiplies no bfloat16
    return {"HALF": kind, "R": max(16, 1 << (rank - 1).bit_length())}


def _most(count: int) -> dict[str, int]:
    from ..triton_kernels.low_rank import MOST_PARTS

    return {"MOST": 1 if count == 1 else MOST_PARTS}
