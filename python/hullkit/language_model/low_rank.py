"""Low-rank adapters beside a linear layer: y = base(x) + scale (x A^T) B^T, as PEFT's LoRA."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .products import SharedInput, add_product

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
        tried = copy.copy(module)  # its own dict of parts
        random = torch.Generator().manual_seed(0)
        base, a, b = (_layer(*size, random) for size in ((_IN, _OUT), (_IN, _RANK), (_RANK, _OUT)))
        parts = (base, nn.ModuleDict({name: a}), nn.ModuleDict({name: b}))
        tried.__dict__["_modules"] = {**module._modules, **dict(zip(_PARTS, parts, strict=True))}
        x = torch.randn(_ROWS, _IN, generator=random)
        with torch.no_grad():
            got = type(module).forward(tried, x)
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


def _layer(columns: int, rows: int, random: torch.Generator) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, columns, generator=random)
    return layer


def add_low_rank(
    y: Tensor, x: Tensor, shared: SharedInput, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """y + scale (x a^T) b^T.

    y (..., D_out). x (..., D_in): the tensor that `share` returned with `shared`, of y's dtype.
    a (r, D_in), b (D_out, r).
    """
    result: Tensor = _AddLowRank.apply(y, x, a, b, shared, scale)  # type: ignore[no-untyped-call]
    return result


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, shared: SharedInput, scale: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.scale, ctx.of_x = shared, scale, ctx.needs_input_grad[1]
        inner = _product(x.reshape(-1, x.shape[-1]), a.to(x.dtype).t(), scale)
        ctx.save_for_backward(x, inner, a, b)
        flat = y.reshape(-1, y.shape[-1])
        return torch.addmm(flat, inner, b.to(x.dtype).t()).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        if gradient is None:
            return None, None, None, None, None, None
        x, inner, a, b = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        d_a = d_b = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[3]:
                d_b = g.new_empty(b.shape, dtype=b.dtype)
                add_product(d_b, g.t(), inner, fresh=True)
            d_inner = _product(g, b.to(g.dtype), ctx.scale)
            if ctx.needs_input_grad[2]:
                d_a = g.new_empty(a.shape, dtype=a.dtype)
                add_product(d_a, d_inner.t(), rows, fresh=True)
            if ctx.of_x:
                ctx.shared.add(d_inner, a.to(g.dtype))
        return gradient, None, d_a, d_b, None, None


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a @ b."""
    return torch.addmm(a.new_empty(1), a, b, beta=0.0, alpha=scale)
