# SPDX-License-Identifier: Apache-2.0
"""How the linear layers of a frozen model run with the factors of several slots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..language_model.low_rank_products import (
    MOST_LAYERS,
    Inner,
    ShrinkGradient,
    Shrunk,
    expand,
    expand_gradients,
    shrink,
    shrink_gradients,
)
from ..language_model.products import SharedInput, SharedInputs
from .layers import Layer


class _Call:
    """How layers run: with the factors of which slots, on how many rows of tokens.

    of: the slots. tokens: of a pass with a backward half. anchor: as `SlotForwards.learning`'s.
    """

    def __init__(
        self, of: slice, tokens: int | None, anchor: Tensor | None, inputs: SharedInputs
    ) -> None:
        self.of = of
        self.slots: int = of.stop - of.start
        self.tokens = tokens
        self.anchor = anchor
        self.inputs = inputs
        self._readers: dict[SharedInput, list[Layer]] = {}
        self._shrunk: dict[str, tuple[SharedInput, Shrunk]] = {}

    def shrunk(
        self, layer: Layer, x: Tensor, shared: SharedInput, scale: float, backend: str | None
    ) -> Shrunk:
        """x (K, T, I) with the layer's factors, and for later with those of other readers of x."""
        if self.anchor is None:
            return shrink(x, [layer.a[self.of]], scale, backend)[0]
        self._readers.setdefault(shared, []).append(layer)
        known = self._shrunk.pop(layer.name, None)
        if known is None or known[0] is not shared:
            together = shrink(x, [other.a[self.of] for other in layer.readers], scale, backend)
            for other, one in zip(layer.readers, together, strict=True):
                self._shrunk[other.name] = (shared, one)
            known = self._shrunk.pop(layer.name)
        return known[1]

    def note_readers(self) -> None:
        """Tells the layers who read their inputs. The next pass is mostly as this one was."""
        for layers in self._readers.values():
            for at in range(0, len(layers), MOST_LAYERS):
                first, *others = layers[at : at + MOST_LAYERS]
                first.readers = (first, *others)
                for other in others:
                    other.readers = (other,)


class SlotForwards:
    """Runs layers with the factors of slots.

    scale: of the low-rank product. backend: "triton" takes CPU tensors too.
    """

    def __init__(self, layers: list[Layer], scale: float, backend: str | None) -> None:
        self._layers = layers
        self._scale = scale
        self._backend = backend
        self._used: set[str] = set()

    def check(self, model: nn.Module) -> None:
        """Raises RuntimeError for a layer that somebody has replaced in the model."""
        for layer in self._layers:
            try:
                present: Any = model.get_submodule(layer.name)
            except AttributeError:
                present = None
            if present is not layer.module:
                raise RuntimeError(
                    f"{layer.name}: expected the layer of which the batch was made, got another; "
                    "make a new PromptBatch"
                )

    @contextmanager
    def refreshed(self) -> Iterator[None]:
        """A block that begins with copies of the weights as they are now."""
        for layer in self._layers:
            layer.refresh()
        yield

    @contextmanager
    def some(self, first: int, slots: int) -> Iterator[None]:
        """Inside the block row i of a batch goes through the factors of slot first + i.

        slots: the number of rows.
        """
        with self._replaced(_Call(slice(first, first + slots), None, None, SharedInputs())):
            yield

    @contextmanager
    def learning(
        self, first: int, shape: torch.Size, anchor: Tensor, inputs: SharedInputs
    ) -> Iterator[None]:
        """As `some`, of a pass with a backward half, of ids of this shape (R, T).

        Every layer may then run once, since its gradients are overwritten.

        anchor: a tensor that requires a gradient.
        inputs: of the layers in that pass.
        """
        self._used = set()
        for layer in self._layers:
            layer.learned = False
        rows, length = shape
        call = _Call(slice(first, first + rows), rows * length, anchor, inputs)
        with self._replaced(call):
            yield
        call.note_readers()

    def clear_unlearned(self) -> None:
        """Sets gradients of layers to 0 that took no part in the latest pass."""
        for layer in self._layers:
            if not layer.learned:
                layer.d_a.zero_()
                layer.d_b.zero_()

    @contextmanager
    def _replaced(self, call: _Call) -> Iterator[None]:
        for layer in self._layers:  # what others put there since would be lost at the end
            if "forward" in layer.module.__dict__:
                raise RuntimeError(
                    f"{layer.name}: expected its class's forward, got another: somebody "
                    "replaced it, or the model runs with another slot"
                )
        try:
            for layer in self._layers:
                layer.module.forward = partial(self._forward, layer, call)
            yield
        finally:
            for layer in self._layers:
                layer.module.__dict__.pop("forward", None)

    def _forward(self, layer: Layer, call: _Call, x: Tensor) -> Tensor:
        rows, slots = math.prod(x.shape[:-1]), call.slots
        if rows % slots or (x.ndim > 2 and len(x) % slots):
            raise ValueError(
                f"{layer.name}: expected rows of {slots} slots, got an input {tuple(x.shape)}"
            )
        if call.anchor is not None:
            if rows != call.tokens:  # a part of the tokens, as experts get, may mix slots
                raise RuntimeError(
                    f"{layer.name}: expected a row for each of {call.tokens} tokens, got an input "
                    f"{tuple(x.shape)}"
                )
            if layer.name in self._used:
                raise RuntimeError(f"{layer.name}: expected one call in a pass, got another")
            self._used.add(layer.name)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        tensor, shared = call.inputs.of(x, dtype)
        y: Tensor = _Stacked.apply(  # type: ignore[no-untyped-call]
            tensor, call.anchor, layer, call, shared, self._scale, self._backend
        )
        return y


class _Stacked(torch.autograd.Function):
    """A layer with its slots' factors. The factors' gradients go to the layer's memory.

    The anchor makes autograd call the backward half even where the input has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        layer: Layer,
        call: _Call,
        shared: SharedInput,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        stacked = x.reshape(call.slots, -1, x.shape[-1])
        stacked = stacked if stacked.stride(-1) == 1 else stacked.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            shrunk = call.shrunk(layer, stacked, shared, scale, backend)
            y = layer.product(x)
            wide = y.view(call.slots, -1, layer.outputs)
            inner = expand(wide, shrunk, layer.b[call.of])
        if anchor is not None:
            ctx.save_for_backward(stacked, *inner)
            ctx.layer, ctx.of, ctx.shared, ctx.scale = layer, call.of, shared, scale
            ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, ...]:
        x, *inner = ctx.saved_tensors
        layer: Layer = ctx.layer
        of: slice = ctx.of
        d = d.reshape(*x.shape[:2], -1).contiguous()
        with torch.autocast(d.device.type, enabled=False):
            layer.learned = True
            b, d_b = layer.b[of], layer.d_b[of]
            d_inner = expand_gradients(d, b, Inner(*inner), ctx.scale, d_b)
            part = ShrinkGradient(layer.a[of], d_inner, layer.d_a[of])
            if ctx.needs_input_grad[0]:
                ctx.shared.add(d.flatten(0, 1), layer.weight(d.dtype).t())
                ctx.shared.defer(_Reader(x, part, ctx.backend), _finish)
            else:
                shrink_gradients(x, [part], None, True, ctx.backend)
        return (None,) * 7


class _Reader(NamedTuple):
    """What a layer leaves until the gradient of its input x (K, T, I) is taken."""

    x: Tensor
    gradient: ShrinkGradient
    backend: str | None


def _finish(shared: SharedInput, readers: list[_Reader]) -> None:
    """Adds what the slots' factors of all readers of an input do to its gradient."""
    x, _, backend = readers[0]
    with torch.autocast(x.device.type, enabled=False):
        total, _ = shared.total(x.shape[0] * x.shape[1], x.shape[2], x.device)
        for at in range(0, len(readers), MOST_LAYERS):
            some = [reader.gradient for reader in readers[at : at + MOST_LAYERS]]
            shrink_gradients(x, some, total.view(x.shape), False, backend)
