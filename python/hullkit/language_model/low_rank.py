# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside a linear layer: y = base(x) + scale (x A^T) B^T, as PEFT's LoRA."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .low_rank_products import (
    ExpandGradient,
    Inner,
    ShrinkGradient,
    expand,
    expand_gradients,
    shrink,
    shrink_gradients,
)
from .products import SharedInput
from .trials import random_linear, random_tensor, trial

_PARTS = ("base_layer", "lora_A", "lora_B")
_ROWS, _IN, _RANK, _OUT = 4, 6, 3, 5  # of a proof


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
        thin = module.lora_A[name], module.lora_B[name]
        layers = (*thin, module.base_layer)
        if any(type(layer) is not nn.Linear or is_watched(layer) for layer in layers):
            return None
        if any(layer.bias is not None for layer in thin):
            return None
        random = torch.Generator(device="cpu").manual_seed(0)
        sizes = (_IN, _OUT), (_IN, _RANK), (_RANK, _OUT)
        base, a, b = (random_linear(*size, random) for size in sizes)
        parts = (base, nn.ModuleDict({name: a}), nn.ModuleDict({name: b}))
        x = random_tensor(random, _ROWS, _IN)
    except Exception:
        return None
    tried = trial(module, x, dict(zip(_PARTS, parts, strict=True)))
    if tried is None:
        return None
    x = tried.leaves[0]
    wanted = base(x) + adapter.scale * b(a(x))
    # Sums of a few products of numbers of size 1; orders may differ.
    bound = 64.0 * torch.finfo(x.dtype).eps * (1.0 + abs(adapter.scale))
    same = tried.y.shape == wanted.shape and bool(((tried.y - wanted).abs() <= bound).all())
    return adapter if same and tried.has_gradients_of(wanted, 1e-3) else None


def factors(module: Any, adapter: LowRank) -> tuple[Tensor, Tensor]:
    """A (R, D) and B (E, R) of the adapter."""
    return module.lora_A[adapter.name].weight, module.lora_B[adapter.name].weight


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has replaced the module's forward, or is told of its calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    more = (module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(map(bool, (*hooks, *more)))


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
        wide, rows, down, up = _entries(y, x, a, b)
        [shrunk] = shrink(rows, [down], scale, backend)
        inner = expand(wide, shrunk, up)
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
        d, rows, down, up = _entries(gradient, x, a, b)
        plain = torch.contiguous_format
        d_a, d_b = (
            torch.empty_like(t, memory_format=plain) if of else None
            for t, of in ((a, of_a), (b, of_b))
        )
        d_x, fresh = None, False
        if of_x:
            total, fresh = ctx.shared.total(x.numel() // x.shape[-1], x.shape[-1], x.device)
            d_x = total.view(rows.shape)
        to_a = None if d_a is None else d_a.view(down.shape)
        to_b = None if d_b is None else d_b.view(up.shape)
        with torch.autocast(x.device.type, enabled=False):
            inner = Inner(values, finished)
            [d_inner] = expand_gradients([ExpandGradient(d, up, inner, to_b)], ctx.scale)
            part = ShrinkGradient(down, d_inner, to_a)
            shrink_gradients(rows, [part], d_x, fresh, ctx.backend)
        return gradient, None, d_a, d_b, None, None, None


def _entries(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [K, T, E], x [K, T, D], a [K, R, D], b [K, E, R]; K = 1 for factors of all rows."""
    a, b = (factor if factor.ndim == 3 else factor[None] for factor in (a, b))
    y, x = (t.reshape(len(a), -1, t.shape[-1]) for t in (y, x))
    x = x if x.stride(-1) == 1 else x.contiguous()
    return y.contiguous(), x, a.contiguous(), b.contiguous()
