# SPDX-License-Identifier: Apache-2.0
"""PEFT's layers in a pass: a frozen linear layer and its adapter as one product."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .low_rank import LowRank, factors
from .low_rank_layers import Adapted, Part, Readers, leave, made_now, outputs
from .low_rank_products import Inner
from .products import SharedInput, WeightProducts
from .recent_tensors import states

# Who read the same input as a layer in the latest pass. No pass relies on it.
_TOGETHER: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = (
    weakref.WeakKeyDictionary()
)


class _Made(NamedTuple):
    """A layer's y (..., O) and inner (1, T, R), None if no kernel made them.

    state: of the tensors of which they were made.
    """

    adapted: Adapted
    state: list[tuple[int, int]]
    output: tuple[Tensor, Inner] | None


class AdaptedLayers:
    """The layers of one pass whose frozen base and adapter were found to be a known formula.

    backend: "triton" takes CPU tensors too. products: may take the factors' gradients.
    """

    def __init__(self, backend: str | None, products: WeightProducts | None) -> None:
        self._backend = backend
        self._products = WeightProducts() if products is None else products
        self._known: dict[nn.Module, LowRank] = {}
        self._readers: Readers[nn.Module, _Made] = Readers()

    def note(self, module: nn.Module, adapter: LowRank) -> None:
        """This module computes the formula of this adapter."""
        self._known[module] = adapter

    def output(self, module: nn.Module, x: Tensor, shared: SharedInput) -> Tensor | None:
        """The module's output; None if no kernel does it.

        x (..., I): the tensor that `share` returned with `shared`.
        """
        adapted = self._adapted(module, x)
        if adapted is None:
            return None
        scale = self._known[module].scale
        expected = self._expected(module, adapted, x)
        made = self._readers.made(
            module, shared, x.shape, list(expected),
            lambda chosen: self._make(x, [expected[one] for one in chosen], scale),
        )  # fmt: skip
        if made.state != _state(adapted):  # somebody has changed a factor since it was made
            [made] = self._make(x, [adapted], scale)
        if made.output is None:
            return None
        a, b = factors(module, self._known[module])
        y: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
            x, a, b, made, shared, self._products, scale, self._backend
        )
        return y

    def note_readers(self) -> None:
        """Keeps for the next pass who read one input."""
        for layers in self._readers.groups():
            for layer in layers:
                _TOGETHER.pop(layer, None)
            if len(layers) > 1:
                _TOGETHER[layers[0]] = [weakref.ref(layer) for layer in layers[1:]]

    def _expected(self, module: nn.Module, own: Adapted, x: Tensor) -> dict[nn.Module, Adapted]:
        """The module, and others of its rank and scale that read the same in the latest pass."""
        found = {module: own}
        for reference in _TOGETHER.get(module, []):
            other = reference()
            adapted = None if other is None else self._adapted(other, x)
            if other is None or adapted is None or adapted.a.shape != own.a.shape:
                continue
            if self._known[other].scale == self._known[module].scale:
                found[other] = adapted
        return found

    def _make(self, x: Tensor, layers: Sequence[Adapted], scale: float) -> list[_Made]:
        rows = x.reshape(1, -1, x.shape[-1])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            counters, shape = self._readers.counters, x.shape[:-1]
            made = outputs(rows, shape, layers, scale, counters, self._backend)
        return [_Made(layer, _state(layer), one) for layer, one in zip(layers, made, strict=True)]

    def _adapted(self, module: nn.Module, x: Tensor) -> Adapted | None:
        """The layer's tensors; None if they are not all of x's dtype, or the base is trained."""
        if module not in self._known:
            return None
        base: Any = module.base_layer
        a, b = factors(module, self._known[module])
        weight, bias = base.weight, base.bias
        frozen = [weight] if bias is None else [weight, bias]
        if any(t.requires_grad for t in frozen) or any(
            t.dtype is not x.dtype or t.device != x.device for t in (*frozen, a, b)
        ):
            return None
        if not (a.is_contiguous() and b.is_contiguous()):
            return None
        if weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            return None
        return Adapted(weight.detach(), bias, a.detach()[None], b.detach()[None])


def _state(adapted: Adapted) -> list[tuple[int, int]]:
    return states(adapted.weight, adapted.bias, adapted.a, adapted.b)


class _LowRankLinear(torch.autograd.Function):
    """The made output of a frozen layer and its factors, with gradients for x, a and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        made: _Made,
        shared: SharedInput,
        products: WeightProducts,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        assert made.output is not None
        y, inner = made.output
        ctx.save_for_backward(x, *inner, a, b, made.adapted.weight)
        ctx.known, ctx.shared, ctx.products = (a, b), shared, products
        ctx.scale, ctx.backend = scale, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d: Tensor | None
    ) -> tuple[None, Tensor | None, Tensor | None, None, None, None, None, None]:
        if d is None:
            return None, None, None, None, None, None, None, None
        x, values, finished, a, b, weight = ctx.saved_tensors
        of_x, of_a, of_b, *_ = ctx.needs_input_grad
        products: WeightProducts = ctx.products
        known_a, known_b = ctx.known
        d_a, d_b = (torch.empty_like(t) if of else None for t, of in ((a, of_a), (b, of_b)))
        # Gradients that somebody else takes may be made with d_x; autograd wants its own now.
        took_a = d_a is None or products.take_gradient(known_a, d_a)
        took_b = d_b is None or products.take_gradient(known_b, d_b)
        with_d_x = of_x and took_a
        x = x.reshape(1, -1, x.shape[-1])
        part = Part(
            x=x,
            d=d.reshape(1, x.shape[1], -1).contiguous(),
            adapted=Adapted(weight.to(d.dtype), None, a[None], b[None]),
            inner=Inner(values, finished),
            scale=ctx.scale,
            d_inner=None,
            d_a=None if d_a is None else d_a[None],
            d_b=None if d_b is None else d_b[None],
            backend=ctx.backend,
        )
        if not (with_d_x and took_b):
            part = made_now(part, of_a=not with_d_x)
        if of_x:
            if not took_a:  # it may be updated before d_x reads it
                part = part._replace(adapted=part.adapted._replace(a=a.detach()[None].clone()))
            leave(ctx.shared, part)
        given = None if took_a else d_a, None if took_b else d_b
        return None, *given, None, None, None, None, None
