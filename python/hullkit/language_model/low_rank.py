# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside a linear layer: y = base(x) + scale (x A^T) B^T, as PEFT's LoRA."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .low_rank_products import (
    low_rank_add_,
    low_rank_gradient_x_,
    low_rank_gradients,
    low_rank_inner,
)
from .products import SharedInput, linear_backward, linear_forward
from .trials import random_linear, trial

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
        factors = module.lora_A[name], module.lora_B[name]
        layers = (*factors, module.base_layer)
        if any(type(layer) is not nn.Linear or is_watched(layer) for layer in layers):
            return None
        if any(layer.bias is not None for layer in factors):
            return None
        random = torch.Generator().manual_seed(0)
        sizes = (_IN, _OUT), (_IN, _RANK), (_RANK, _OUT)
        base, a, b = (random_linear(*size, random) for size in sizes)
        parts = (base, nn.ModuleDict({name: a}), nn.ModuleDict({name: b}))
        x = torch.randn(_ROWS, _IN, generator=random)
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


def low_rank_linear(
    x: Tensor,
    shared: SharedInput,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """x @ weight^T + bias + scale (x a^T) b^T, with gradients for all five tensors.

    x (..., D): the tensor that `share` returned with `shared`. weight (E, D).
    a (R, D), b (E, R); or a (K, R, D), b (K, E, R) for x (K, ..., D), each entry with its own.
    backend: "triton" takes CPU tensors too, in Triton's interpreter.

    Cost: R (D + E) multiply-adds for each row of x forwards, twice that backwards, beside those of
    the layer. In a captured pass all but the two sums into y and x's gradient run beside the
    layer's own products.
    """
    result: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, shared, scale, backend)  # type: ignore[no-untyped-call]
    return result


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        shared: SharedInput,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.scale, ctx.backend = shared, scale, backend
        of_bias = ctx.needs_input_grad[2]
        ctx.bias = bias.dtype if bias is not None and of_bias else None
        rows, *factors = _entries(x, a, b)
        with low_rank_inner(rows, factors[0], scale, backend) as thin:
            y = linear_forward(x, weight, bias, transposed=False)
        inner = low_rank_add_(y.view(*rows.shape[:2], -1), factors[1], thin)
        ctx.save_for_backward(x, weight, a, b, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 8
        x, weight, a, b, inner = ctx.saved_tensors
        of_x, of_weight, _, of_a, of_b = ctx.needs_input_grad[:5]
        rows, stacked_a, stacked_b = _entries(x, a, b)
        g = gradient.reshape(-1, gradient.shape[-1])
        g = g if g.stride(-1) == 1 else g.contiguous()
        d_a, d_b = (torch.empty_like(t) if of else None for t, of in ((a, of_a), (b, of_b)))
        shared = ctx.shared if of_x else None
        with (
            torch.autocast(x.device.type, enabled=False),
            low_rank_gradients(
                g.view(*rows.shape[:2], -1), rows, stacked_a, stacked_b, inner, ctx.scale,
                d_a, d_b, ctx.backend,
            ) as d_inner,
        ):  # fmt: skip
            of_base = linear_backward(
                g, x if of_weight else None, weight, shared, ctx.bias, transposed=False
            )
        if of_base.of_x is not None:
            low_rank_gradient_x_(of_base.of_x.view(rows.shape), stacked_a, d_inner)
        return None, of_base.of_weight, of_base.of_bias, d_a, d_b, None, None, None


def _entries(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [K, T, D], a [K, R, D], b [K, E, R]; K = 1 for factors of all rows."""
    a, b = (factor if factor.ndim == 3 else factor[None] for factor in (a, b))
    rows = x.reshape(len(a), -1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous(), a.contiguous(), b.contiguous()
