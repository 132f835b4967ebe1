# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a frozen model, and how they run with the factors of several slots."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..language_model.low_rank import Gradients, low_rank_backward, low_rank_forward_
from ..language_model.products import SharedInput, SharedInputs, add_product, product

_CONV1D = "transformers.pytorch_utils.Conv1D"


class Layer:
    """A linear layer of the model. `SlotFactors` sets its factors.

    a (K, R, I), b (K, O, R): what products read. d_a, d_b: float32, where gradients go.
    """

    a: Tensor
    b: Tensor
    d_a: Tensor
    d_b: Tensor

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.transposed = isinstance(module, nn.Linear)  # weight (O, I), else (I, O)
        weight: Tensor = module.weight
        self.outputs, self.inputs = weight.shape if self.transposed else weight.shape[::-1]
        self._copy: tuple[Tensor, int, Tensor] | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (I, O) in the dtype of products. A copy is kept: the weight is frozen."""
        weight: Tensor = self.module.weight
        own = weight.detach()
        if own.dtype is not dtype:
            copy = self._copy
            if copy is None or copy[0] is not weight or copy[1] != weight._version:
                self._copy = copy = (weight, weight._version, own.to(dtype))
            own = copy[2]
        return own.t() if self.transposed else own


def chosen_layers(model: nn.Module, target: str | Sequence[str]) -> list[Layer]:
    """The layers that get factors, checked.

    target: "all-linear", or ends of names. The output head never gets factors.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    ends = None if isinstance(target, str) else tuple(target)
    found = []
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if not (isinstance(module, nn.Linear) or kind == _CONV1D) or module is head:
            continue
        if ends is not None and not any(re.search(rf"(^|\.){re.escape(e)}$", name) for e in ends):
            continue
        if type(module) is not nn.Linear and kind != _CONV1D:
            raise ValueError(
                "model: expected linear layers of torch.nn.Linear or transformers' Conv1D, got "
                f"{kind}: {name!r}"
            )
        if "forward" in module.__dict__:
            raise ValueError(f"model: expected layers with their own forward, got {name!r}")
        found.append(Layer(name, module))
    if not found:
        raise ValueError(f"target: expected linear layers in the model, got none for {target!r}")
    return found


class SlotForwards:
    """Runs layers with the factors of slots: of all, or of one.

    scale: of the low-rank product. autocast: whether products are in bfloat16.
    """

    def __init__(self, layers: list[Layer], slots: int, scale: float, backend: str | None) -> None:
        self._layers = layers
        self._slots = slots
        self._scale = scale
        self._backend = backend
        self._used: set[str] = set()

    @contextmanager
    def all(
        self, anchor: Tensor | None = None, inputs: SharedInputs | None = None
    ) -> Iterator[None]:
        """Inside the block row k of a batch goes through the factors of slot k.

        anchor: a tensor that requires a gradient, of a pass with a backward half. Every layer may
            then run once, since its gradients are overwritten.
        inputs: of the layers in that pass.
        """
        self._used = set()
        with self._replaced(slice(None), self._slots, anchor, inputs or SharedInputs()):
            yield

    @contextmanager
    def one(self, slot: int) -> Iterator[None]:
        """Inside the block the model behaves as adapted with one slot."""
        with self._replaced(slice(slot, slot + 1), 1, None, SharedInputs()):
            yield

    @contextmanager
    def _replaced(
        self, of: slice, slots: int, anchor: Tensor | None, inputs: SharedInputs
    ) -> Iterator[None]:
        for layer in self._layers:  # what others put there since would be lost at the end
            if "forward" in layer.module.__dict__:
                raise RuntimeError(
                    f"{layer.name}: expected its class's forward, got another: somebody "
                    "replaced it, or the model runs with another slot"
                )
        try:
            for layer in self._layers:
                forward = partial(self._forward, layer, of, slots, anchor, inputs)
                layer.module.forward = forward
            yield
        finally:
            for layer in self._layers:
                layer.module.__dict__.pop("forward", None)

    def _forward(
        self,
        layer: Layer,
        of: slice,
        slots: int,
        anchor: Tensor | None,
        inputs: SharedInputs,
        x: Tensor,
    ) -> Tensor:
        rows = math.prod(x.shape[:-1])
        if rows % slots or (x.ndim > 2 and len(x) % slots):
            raise ValueError(
                f"{layer.name}: expected rows of {slots} slots, got an input {tuple(x.shape)}"
            )
        if anchor is not None:
            if layer.name in self._used:
                raise RuntimeError(f"{layer.name}: expected one call in a pass, got another")
            self._used.add(layer.name)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        tensor, shared = inputs.of(x, dtype)
        factors = (slots, layer.a[of], layer.b[of])
        y: Tensor = _Stacked.apply(  # type: ignore[no-untyped-call]
            tensor, anchor, layer, shared, factors, self._scale, self._backend
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
        shared: SharedInput,
        factors: tuple[int, Tensor, Tensor],
        scale: float,
        backend: str | None,
    ) -> Tensor:
        slots, a, b = factors
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            y = product(x, rows, layer.weight(x.dtype), layer.module.bias)
            stacked = rows.view(slots, -1, rows.shape[1])
            inner = low_rank_forward_(y.view(slots, -1, y.shape[-1]), stacked, a, b, scale, backend)
        if anchor is not None:
            ctx.save_for_backward(stacked, inner)
            ctx.layer, ctx.shared, ctx.scale, ctx.backend = layer, shared, scale, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, ...]:
        x, inner = ctx.saved_tensors
        layer: Layer = ctx.layer
        d = d.reshape(*x.shape[:2], -1).contiguous()
        d_x = None
        with torch.autocast(d.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                total, fresh = ctx.shared.total(x.shape[0] * x.shape[1], x.shape[2], x.device)
                add_product(total, d.flatten(0, 1), layer.weight(d.dtype).t(), fresh)
                d_x = total.view(x.shape)
            to = Gradients(layer.d_a, layer.d_b, d_x, fresh=False)
            low_rank_backward(d, x, layer.a, layer.b, inner, ctx.scale, to, ctx.backend)
        return (None,) * 7
