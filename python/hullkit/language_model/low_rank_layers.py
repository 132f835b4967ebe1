# SPDX-License-Identifier: Apache-2.0
"""Frozen linear layers with low-rank factors, computed at once for all that read one input.

    y_i = x W_i^T + bias_i + scale (x a_i^T) b_i^T
    d_x = sum over i of d_i W_i + d_inner_i a_i,   d_inner_i = scale d_i b_i

Who reads an input is known only once all have. So a pass notes it, and the next one computes what
the first reader needs together with what the others will ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .low_rank_products import MOST_LAYERS, Inner, ShrinkGradient, shrink, shrink_gradients
from .product_sums import ProductSum, Term, product_sums, product_sums_take
from .products import SharedInput

Layer = TypeVar("Layer", bound=Hashable)
Made = TypeVar("Made")


class Readers(Generic[Layer, Made]):
    """What layers make of their inputs in one pass, for all readers of an input at once."""

    def __init__(self) -> None:
        self._readers: dict[SharedInput, list[Layer]] = {}
        self._made: dict[Layer, tuple[SharedInput, Made]] = {}
        self._counters: Tensor | None = None

    def made(
        self,
        layer: Layer,
        shared: SharedInput,
        expected: Sequence[Layer],
        make: Callable[[Sequence[Layer]], list[Made]],
    ) -> Made:
        """What `make` makes of this layer and the input whose gradient `shared` takes.

        expected: the layers that will read the input, this one first.
        """
        self._readers.setdefault(shared, []).append(layer)
        known = self._made.pop(layer, None)
        if known is None or known[0] is not shared:
            for other, one in zip(expected, make(expected), strict=True):
                self._made[other] = (shared, one)
            known = self._made.pop(layer)
        return known[1]

    def groups(self) -> Iterator[list[Layer]]:
        """Layers that read one input, at most MOST_LAYERS, in the order of their calls."""
        for layers in self._readers.values():
            for at in range(0, len(layers), MOST_LAYERS):
                yield layers[at : at + MOST_LAYERS]

    def counters(self, x: Tensor) -> Tensor:
        """Zeros for `shrink` and later kernels, which leave zeros. x (K, T, D)."""
        slots, rows = x.shape[:2]
        if self._counters is None or self._counters.shape != (slots, rows):
            self._counters = x.new_zeros(slots, rows, dtype=torch.int32)
        return self._counters


class Adapted(NamedTuple):
    """A frozen linear layer and its factors: weight (O, I), bias (O,), a (K, R, I), b (K, O, R)."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor


def outputs(
    x: Tensor,
    shape: torch.Size,
    layers: Sequence[Adapted],
    scale: float,
    counters: Tensor,
    backend: str | None,
) -> list[tuple[Tensor, Inner]] | None:
    """Each layer's y, and what its backward half needs; None if no kernel does it.

    x (K, T, I). shape: of a y without its last dimension, K T elements. A y is no view, since
        models write to it.
    layers: at most MOST_LAYERS, whose factors have one shape and distance between slots.
    counters: as `shrink`'s.
    """

    def sums(inners: Sequence[Tensor]) -> list[ProductSum]:
        return [
            ProductSum([Term(x, layer.weight[None]), Term(inner, layer.b)], layer.bias)
            for layer, inner in zip(layers, inners, strict=True)
        ]

    unwritten = x.new_empty(*x.shape[:2], layers[0].b.shape[2])
    if not product_sums_take(sums([unwritten] * len(layers)), False, backend):
        return None
    shrunk = shrink(x, [layer.a for layer in layers], scale, backend, counters)
    made = [x.new_empty(*shape, len(layer.weight)) for layer in layers]
    out = [y.view(*x.shape[:2], -1) for y in made]
    product_sums(sums([own.values for own in shrunk]), False, out)
    return [(y, Inner(own.values, own.finished)) for y, own in zip(made, shrunk, strict=True)]


class Part(NamedTuple):
    """What a layer leaves for its input's gradient, d W + d_inner a, until all readers have.

    x (K, T, I): the input. d (K, T, O): the gradient of y. weight: gives (O, I) in a dtype.
    of_a: the factor a (K, R, I), d_inner (K, T, R), and where d_a goes, unless it is made already.
    """

    x: Tensor
    d: Tensor
    weight: Callable[[torch.dtype], Tensor]
    of_a: ShrinkGradient
    backend: str | None


def leave(shared: SharedInput, part: Part) -> None:
    """Adds the part to the input's gradient when that is taken."""
    shared.defer(part, _finish)


def _finish(shared: SharedInput, parts: list[Part]) -> None:
    with torch.autocast(parts[0].x.device.type, enabled=False):
        for at in range(0, len(parts), MOST_LAYERS):
            _finish_some(shared, parts[at : at + MOST_LAYERS])


def _finish_some(shared: SharedInput, parts: list[Part]) -> None:
    x, d, *_, backend = parts[0]
    weights = [part.weight(d.dtype) for part in parts]
    of_a = [part.of_a for part in parts]
    terms = []
    for part, weight in zip(parts, weights, strict=True):
        terms += [Term(part.d, weight[None]), Term(part.of_a.d_inner, part.of_a.a)]
    sums = [ProductSum(terms)]
    if shared.dtype is d.dtype and product_sums_take(sums, True, backend):
        shrink_gradients(x, of_a, None, True, backend)
        shared.put(product_sums(sums, True)[0].flatten(0, 1))
        return
    for part, weight in zip(parts, weights, strict=True):
        shared.add(part.d.flatten(0, 1), weight)
    total, _ = shared.total(x.shape[0] * x.shape[1], x.shape[2], x.device)
    shrink_gradients(x, of_a, total.view(x.shape), False, backend)
