# SPDX-License-Identifier: Apache-2.0
"""Frozen linear layers with low-rank factors, computed at once for all that read one input.

    y_i = x W_i^T + bias_i + scale (x a_i^T) b_i^T
    d_x = sum over i of d_i W_i + d_inner_i a_i,   d_inner_i = scale d_i b_i

Who reads an input is known only once all have. So a pass notes it, and the next one computes what
the first reader needs together with what the others will ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .low_rank_products import (
    MOST_LAYERS,
    ExpandGradient,
    Inner,
    ShrinkGradient,
    expand_gradients,
    shrink,
    shrink_gradients,
)
from .product_sums import (
    FactorGradients,
    ProductSum,
    Term,
    gradients_take,
    product_sums,
    product_sums_take,
)
from .products import SharedInput

Layer = TypeVar("Layer", bound=Hashable)
Made = TypeVar("Made")


class Readers(Generic[Layer, Made]):
    """What layers make of their inputs in one pass, for all readers of an input at once."""

    def __init__(self) -> None:
        # By the input and its shape: another reader may see rows where this one sees texts of rows.
        self._readers: dict[tuple[SharedInput, torch.Size], list[Layer]] = {}
        self._made: dict[Layer, tuple[tuple[SharedInput, torch.Size], Made]] = {}
        self._counters: Tensor | None = None

    def made(
        self,
        layer: Layer,
        shared: SharedInput,
        shape: torch.Size,
        expected: Sequence[Layer],
        make: Callable[[Sequence[Layer]], list[Made]],
    ) -> Made:
        """What `make` makes of this layer and the input whose gradient `shared` takes.

        shape: of the input, as `make` sees it.
        expected: the layers that will read the input in this shape, this one first.
        """
        of = shared, shape
        before = self._readers.setdefault(of, [])
        known = self._made.pop(layer, None)
        if known is None or known[0] != of:
            waiting = {other for other, made in self._made.items() if made[0] == of}
            done = waiting.union(before) - {layer}
            wanted = [other for other in expected if other not in done]
            for other, one in zip(wanted, make(wanted), strict=True):
                self._made[other] = (of, one)
            known = self._made.pop(layer)
        before.append(layer)
        return known[1]

    def groups(self) -> Iterator[list[Layer]]:
        """At most MOST_LAYERS that read one input in one shape, in the order of their calls."""
        for readers in self._readers.values():
            layers = list(dict.fromkeys(readers))  # one may run twice
            for at in range(0, len(layers), MOST_LAYERS):
                yield layers[at : at + MOST_LAYERS]

    def counters(self, x: Tensor) -> Tensor:
        """Zeros for `shrink` and later kernels, which leave zeros. x (K, T, D)."""
        shape = (MOST_LAYERS, *x.shape[:2])
        kept = self._counters
        if kept is None or kept.shape != shape or kept.device != x.device:
            kept = self._counters = x.new_zeros(shape, dtype=torch.int32)
        return kept


class Adapted(NamedTuple):
    """A frozen linear layer and its factors: weight (O, I), bias (O,), a (K, R, I), b (K, O, R).

    of_weight: makes the weight, where `weight` is a tensor without memory in its place. Such a
        weight lives for one product.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    of_weight: Callable[[], Tensor] | None = None


def outputs(
    x: Tensor,
    shape: torch.Size,
    layers: Sequence[Adapted],
    scale: float,
    counters: Callable[[Tensor], Tensor],
    backend: str | None,
) -> list[tuple[Tensor, Inner] | None]:
    """Each layer's y, and what its backward half needs; None for one that no kernel computes.

    Whether a kernel does depends on the layer alone, so that its bits do not depend on who else is
    known to read x.

    x (K, T, I). shape: of a y without its last dimension, K T elements. A y is no view, since
        models write to it.
    layers: at most MOST_LAYERS, whose factors have one shape and distance between slots.
    counters: makes `shrink`'s.
    """
    unwritten = x.new_empty(*x.shape[:2], layers[0].b.shape[2])
    places = [
        place
        for place, own in enumerate(layers)
        if product_sums_take([_sum(x, own, unwritten)], False, backend)
    ]
    results: list[tuple[Tensor, Inner] | None] = [None] * len(layers)
    if not places:
        return results
    chosen = [layers[place] for place in places]
    shrunk = shrink(x, [own.a for own in chosen], scale, backend, counters(x))
    made = [x.new_empty(*shape, len(own.weight)) for own in chosen]
    out = [y.view(*x.shape[:2], -1) for y in made]
    if all(own.of_weight is None for own in chosen):
        sums = [_sum(x, own, thin.values) for own, thin in zip(chosen, shrunk, strict=True)]
        product_sums(sums, False, out)
    else:
        for own, thin, y in zip(chosen, shrunk, out, strict=True):
            whole = own._replace(weight=_weight(own))
            product_sums([_sum(x, whole, thin.values)], False, [y])
    for place, y, thin in zip(places, made, shrunk, strict=True):
        results[place] = (y, Inner(thin.values, thin.finished))
    return results


def _sum(x: Tensor, layer: Adapted, inner: Tensor) -> ProductSum:
    return ProductSum([Term(x, layer.weight[None]), Term(inner, layer.b)], layer.bias)


class Part(NamedTuple):
    """What a layer leaves for its input's gradient, d W + d_inner a, until all readers have.

    x (K, T, I): the input. d (K, T, O): the gradient of y. adapted: the layer.
    inner, scale: of its forward half.
    d_inner (K, T, R): None until it is made. d_b is made with it.
    d_a, d_b: where the factors' gradients go; None for one that is not wanted, or made already.
    """

    x: Tensor
    d: Tensor
    adapted: Adapted
    inner: Inner
    scale: float
    d_inner: Tensor | None
    d_a: Tensor | None
    d_b: Tensor | None
    backend: str | None


def made_now(part: Part, of_a: bool) -> Part:
    """The part when its d_inner is made, and with it d_b, and with `of_a` d_a, if wanted."""
    with torch.autocast(part.x.device.type, enabled=False):
        made = _with_inner([part])[0]
        if of_a:
            shrink_gradients(part.x, [_of_a(made)], None, True, part.backend)
            made = made._replace(d_a=None)
    return made


def leave(shared: SharedInput, part: Part) -> None:
    """Adds a part to the input's gradient when that is taken, or with others before.

    Nobody may write to its tensors until then.
    """
    shared.defer((part, _versions(part)), _finish, MOST_LAYERS)


def _versions(part: Part) -> list[int]:
    """The versions of the tensors that are still read."""
    read = [part.d, part.adapted.a]
    if part.d_a is not None:
        read.append(part.x)
    if part.d_inner is None:
        read.append(part.adapted.b)
    if part.d_b is not None:
        read.append(part.inner.values)
    return [tensor._version for tensor in read]


def _finish(shared: SharedInput, left: list[tuple[Part, list[int]]]) -> None:
    if any(_versions(part) != versions for part, versions in left):
        raise RuntimeError(
            "expected gradients, factors and inputs that nobody writes to in the backward pass, "
            "got one that was written to before the gradient of its layer's input was made"
        )
    parts = [part for part, _ in left]
    with torch.autocast(parts[0].x.device.type, enabled=False):
        _add(shared, _with_inner(parts))


def _with_inner(parts: Sequence[Part]) -> list[Part]:
    """The parts with d_inner, which kernels make for several at once."""
    made: list[Part] = []
    for pending, alike in groupby(parts, key=_kind):
        group = list(alike)
        if pending is not None:
            layers = [ExpandGradient(own.d, own.adapted.b, own.inner, own.d_b) for own in group]
            d_inner = expand_gradients(layers, group[0].scale)
            group = [
                own._replace(d_inner=thin, d_b=None)
                for own, thin in zip(group, d_inner, strict=True)
            ]
        made += group
    return made


def _kind(part: Part) -> tuple[Any, ...] | None:
    """What parts share whose d_inner is made at once; None if it is made already."""
    if part.d_inner is not None:
        return None
    b, to, inner = part.adapted.b, part.d_b, part.inner
    apart = (b.stride(0), None if to is None else to.stride(0)) if len(b) > 1 else (0, to is None)
    return part.scale, b.shape[2], inner.finished is None, apart


def _of_a(part: Part) -> ShrinkGradient:
    assert part.d_inner is not None
    return ShrinkGradient(part.adapted.a, part.d_inner, part.d_a)


def _add(shared: SharedInput, parts: list[Part]) -> None:
    x, d, backend = parts[0].x, parts[0].d, parts[0].backend
    of_a = [_of_a(part) for part in parts]
    d_x = None
    at_once = shared.dtype is d.dtype and product_sums_take([_gradient(parts)], True, backend)
    if at_once:
        thin = FactorGradients(x, [(own.d_inner, own.d_a) for own in of_a if own.d_a is not None])
        beside = thin if gradients_take(thin) else None
        if beside is not None:
            of_a = []
        whole = [
            part._replace(adapted=part.adapted._replace(weight=_weight(part.adapted)))
            for part in parts
        ]
        [gradient] = product_sums([_gradient(whole)], True, gradients=beside)
        shared.put(gradient.flatten(0, 1))
    else:
        for part in parts:
            shared.add(part.d.flatten(0, 1), _weight(part.adapted))
        d_x = shared.total(x.shape[0] * x.shape[1], x.shape[2], x.device)[0].view(x.shape)
    # Each d_a, and with d_x what products one by one have left out of it.
    for _, alike in groupby(of_a, key=lambda own: (own.a.shape, own.d_a is None)):
        shrink_gradients(x, list(alike), d_x, at_once, backend)


def _gradient(parts: Sequence[Part]) -> ProductSum:
    terms = []
    for part in parts:
        thin = _of_a(part)
        terms += [Term(part.d, part.adapted.weight[None]), Term(thin.d_inner, thin.a)]
    return ProductSum(terms)


def _weight(of: Adapted) -> Tensor:
    """The weight (O, I), made if it has to be."""
    return of.weight if of.of_weight is None else of.of_weight().contiguous()
