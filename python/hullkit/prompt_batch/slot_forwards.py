# SPDX-License-Identifier: Apache-2.0
"""How the linear layers of a frozen model run with the factors of several slots."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..language_model.low_rank_layers import (
    Adapted,
    Part,
    Readers,
    leave,
    made_now,
    outputs,
)
from ..language_model.low_rank_products import Inner, expand, shrink
from ..language_model.products import SharedInput, SharedInputs
from ..native.kernels import WithBlock
from ..native.torch_private import current_backward
from .layers import Layer


class _Call:
    """How layers run: with the factors of which slots, on how many rows of tokens.

    of: the slots. tokens: of a pass with a backward half. anchor: as `SlotForwards.learning`'s.
    scale: of the low-rank product.
    """

    def __init__(
        self,
        of: slice,
        tokens: int | None,
        anchor: Tensor | None,
        inputs: SharedInputs,
        scale: float,
        backend: str | None,
    ) -> None:
        self.of = of
        self.slots: int = of.stop - of.start
        self.tokens = tokens
        self.anchor = anchor
        self.inputs = inputs
        self.scale, self.backend = scale, backend
        self._thread = threading.get_ident()
        self._readers: Readers[Layer, tuple[Tensor, Inner]] = Readers()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of a model, pickled ones too, begin without what was computed of its inputs."""
        of_new = (self.of, self.tokens, self.anchor, SharedInputs(), self.scale, self.backend)
        return _Call, of_new

    def check_thread(self, name: str) -> None:
        """Raises RuntimeError for another thread's call. Its numbers would be those of slots.

        Autograd's own threads have none of their own: they may run a part of a pass again.
        """
        if threading.get_ident() != self._thread and current_backward() == -1:
            raise RuntimeError(
                f"{name}: expected calls of the thread that runs the batch, got another thread's; "
                "run the model there between passes only, for example before `map`"
            )

    def output(self, layer: Layer, x: Tensor, shared: SharedInput) -> tuple[Tensor, Inner]:
        """The layer's y of x (..., I), and for later those of the other readers of x."""
        if self.anchor is None:
            return self._outputs(x, [layer])[0]
        make = partial(self._outputs, x)
        return self._readers.made(layer, shared, x.shape, layer.readers, make)

    def _outputs(self, x: Tensor, layers: Sequence[Layer]) -> list[tuple[Tensor, Inner]]:
        stacked = self.stacked(x)
        made: dict[Layer, tuple[Tensor, Inner]] = {}
        chosen = [layer for layer in layers if self.anchor is not None and layer.multiplies(x)]
        if chosen:
            adapted = [
                Adapted(
                    layer.weight_or_shape(x.dtype), layer.bias, layer.a[self.of], layer.b[self.of],
                    layer.of_weight(x.dtype),
                )
                for layer in chosen
            ]  # fmt: skip
            counters, shape = self._readers.counters, x.shape[:-1]
            found = outputs(stacked, shape, adapted, self.scale, counters, self.backend)
            pairs = zip(chosen, found, strict=True)
            made = {layer: one for layer, one in pairs if one is not None}
        left = [layer for layer in layers if layer not in made]
        if left:
            factors = [layer.a[self.of] for layer in left]
            shrunk = shrink(stacked, factors, self.scale, self.backend)
            for layer, own in zip(left, shrunk, strict=True):
                y = layer.product(x)
                wide = y.view(self.slots, -1, layer.outputs)
                made[layer] = (y, expand(wide, own, layer.b[self.of]))
        return [made[layer] for layer in layers]

    def stacked(self, x: Tensor) -> Tensor:
        """x (..., I) as (K, T, I)."""
        rows = x.reshape(self.slots, -1, x.shape[-1])
        return rows if rows.stride(-1) == 1 else rows.contiguous()

    def note_readers(self) -> None:
        """Tells the layers who read their inputs. The next pass is mostly as this one was."""
        for first, *others in self._readers.groups():
            first.readers = (first, *others)
            for other in others:
                other.readers = (other,)


class SlotForwards:
    """Runs layers with the factors of slots.

    scale: of the low-rank product. backend: "triton" takes CPU tensors too.
    """

    def __init__(self, layers: list[Layer], scale: float, backend: str | None) -> None:
        self._layers = layers
        self._kinds = [layer.kind for layer in layers]
        self._scale = scale
        self._backend = backend
        self._used: set[str] = set()
        self.left_out: tuple[str, ...] = ()  # layers that took no part in the latest pass

    @property
    def ran(self) -> bool:
        """Whether a layer ran in the latest block of `learning`."""
        return bool(self._used)

    def _check(self, model: nn.Module) -> None:
        """Raises RuntimeError for a layer that somebody has replaced in the model, or moved."""
        for layer, kind in zip(self._layers, self._kinds, strict=True):
            try:
                present: Any = model.get_submodule(layer.name)
            except AttributeError:
                present = None
            if present is not layer.module:
                raise RuntimeError(
                    f"{layer.name}: expected the layer of which the batch was made, got another; "
                    "make a new PromptBatch"
                )
            if layer.kind != kind:
                raise RuntimeError(
                    f"{layer.name}: expected a weight as when the batch was made, {kind[0]} on "
                    f"{kind[1]}, got {layer.kind[0]} on {layer.kind[1]}; make a new PromptBatch"
                )

    @contextmanager
    def refreshed(self, model: nn.Module) -> Iterator[None]:
        """A block that begins with copies of the weights as they are now, after a check of them."""
        self._check(model)
        for layer in self._layers:
            layer.refresh()
        yield

    @contextmanager
    def some(self, first: int, slots: int) -> Iterator[None]:
        """Inside the block row i of a batch goes through the factors of slot first + i.

        slots: the number of rows.
        """
        call = _Call(
            slice(first, first + slots), None, None, SharedInputs(), self._scale, self._backend
        )
        with self._replaced(call):
            yield

    def tried(self) -> WithBlock:
        """Inside the block there are two slots with large factors at random, not the batch's."""
        return _Tried(self._layers, self._scale)

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
        rows, length = shape
        of = slice(first, first + rows)
        call = _Call(of, rows * length, anchor, inputs, self._scale, self._backend)
        with self._replaced(call):
            yield
        call.note_readers()

    def forget(self) -> None:
        """Before a pass's backward half: gradients that its forward took for itself are no
        layer's."""
        for layer in self._layers:
            layer.learned = False

    def clear_unlearned(self) -> None:
        """Notes layers that took no part in the latest pass, and sets their gradients to 0."""
        left_out = [layer for layer in self._layers if not layer.learned]
        for layer in left_out:
            layer.d_a.zero_()
            layer.d_b.zero_()
        self.left_out = tuple(layer.name for layer in left_out)

    def check_free(self) -> None:
        """Raises RuntimeError for a layer whose forward is not its class's."""
        for layer in self._layers:
            if "forward" in layer.module.__dict__:
                raise RuntimeError(
                    f"{layer.name}: expected its class's forward, got another: a `slot` block of a "
                    "batch is open, or somebody replaced it"
                )

    @contextmanager
    def _replaced(self, call: _Call) -> Iterator[None]:
        self.check_free()  # what others put there since would be lost at the end
        try:
            for layer in self._layers:
                layer.module.forward = partial(self._forward, layer, call)
            yield
        finally:
            for layer in self._layers:
                layer.module.__dict__.pop("forward", None)

    def _forward(self, layer: Layer, call: _Call, *inputs: Tensor, **named: Tensor) -> Tensor:
        call.check_thread(layer.name)
        if named or len(inputs) != 1:  # by the layer's own name
            own = inspect.signature(type(layer.module).forward)
            inputs = own.bind(layer.module, *inputs, **named).args[1:]
        [x] = inputs
        rows, slots = math.prod(x.shape[:-1]), call.slots
        if rows % slots or (x.ndim > 2 and len(x) % slots):
            raise ValueError(
                f"{layer.name}: expected rows of {slots} slots, got an input {tuple(x.shape)}"
            )
        if call.anchor is not None:
            if rows != call.tokens:  # a part of the tokens, as experts get, may mix slots
                raise RuntimeError(
                    f"{layer.name}: expected a row for each of {call.tokens} tokens, got an input "
                    f"{tuple(x.shape)}; `target` can leave the layer out"
                )
            if layer.name in self._used:
                raise RuntimeError(
                    f"{layer.name}: expected one call in a pass, got another; `target` can leave "
                    "the layer out"
                )
            self._used.add(layer.name)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        tensor, shared = call.inputs.of(x, dtype)
        y: Tensor = _Stacked.apply(  # type: ignore[no-untyped-call]
            tensor, call.anchor, layer, call, shared
        )
        return y


class _Tried(WithBlock):
    """See `SlotForwards.tried`. A signal must not leave these factors behind."""

    def __init__(self, layers: list[Layer], scale: float) -> None:
        super().__init__()
        self._kept = [(layer, layer.a, layer.b) for layer in layers]
        self._scale = scale

    def _claim(self) -> None:
        pass

    def _enter(self) -> None:
        random = torch.Generator(self._kept[0][1].device).manual_seed(0)
        for layer, a, b in self._kept:
            of_a = torch.randn(2, *a.shape[1:], device=a.device, generator=random)
            of_b = torch.randn(2, *b.shape[1:], device=b.device, generator=random)
            # What they add is about half as large as the output of a layer that has just been made.
            # On SmolLM2 another slot's then move logits by 0.55 of their size, and rounding to
            # bfloat16 by 0.007; twice as large ones by 1.0 and 0.027.
            layer.a = (of_a / layer.inputs**0.5).to(a.dtype)
            layer.b = (0.5 * of_b / (self._scale * b.shape[2] ** 0.5)).to(b.dtype)

    def _leave(self) -> None:
        for layer, a, b in self._kept:
            layer.a, layer.b = a, b


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
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, inner = call.output(layer, x, shared)
        if anchor is not None:
            ctx.save_for_backward(call.stacked(x), *inner)
            ctx.layer, ctx.of, ctx.shared = layer, call.of, shared
            ctx.scale, ctx.backend = call.scale, call.backend
        elif ctx.needs_input_grad[0]:  # somebody differentiates by an input
            ctx.save_for_backward(layer.a[call.of], layer.b[call.of])
            ctx.layer, ctx.shared, ctx.scale = layer, shared, call.scale
        ctx.learns = anchor is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, ...]:
        layer: Layer = ctx.layer
        if not ctx.learns:
            a, b = ctx.saved_tensors
            d = d.reshape(len(a), -1, layer.outputs)
            d_x = d @ layer.rows_of_weight(d.dtype)
            d_x.baddbmm_(d @ b.to(d.dtype), a.to(d.dtype), alpha=ctx.scale)
            ctx.shared.put(d_x.flatten(0, 1).to(ctx.shared.dtype))
            return (None,) * 5
        x, *inner = ctx.saved_tensors
        of: slice = ctx.of
        layer.learned = True
        weight, of_weight = layer.weight_or_shape(d.dtype), layer.of_weight(d.dtype)
        part = Part(
            x=x,
            d=d.reshape(*x.shape[:2], -1).contiguous(),
            adapted=Adapted(weight, None, layer.a[of], layer.b[of], of_weight),
            inner=Inner(*inner),
            scale=ctx.scale,
            d_inner=None,
            d_a=layer.d_a[of],
            d_b=layer.d_b[of],
            backend=ctx.backend,
        )
        if ctx.needs_input_grad[0]:
            leave(ctx.shared, part)
        else:
            made_now(part, of_a=True)
        return (None,) * 5
