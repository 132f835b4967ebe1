# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a frozen model, and how they run with the factors of several slots."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..language_model.low_rank import Gradients, Inner, low_rank_backward, low_rank_forward_
from ..language_model.products import SharedInput, SharedInputs, add_product, product
from .quantized import EIGHT_BITS, FOUR_BITS, check_quantized, product_of, weight_of

_CONV1D = "transformers.pytorch_utils.Conv1D"
_OF_ADAPTERS = ("base_layer", "lora_A")  # PEFT's names of what its layers consist of


class Layer:
    """A linear layer of the model. `SlotFactors` sets its factors.

    a (K, R, I), b (K, O, R): what products read. d_a, d_b: float32, where gradients go. learned:
    whether the latest pass has written them.
    """

    a: Tensor
    b: Tensor
    d_a: Tensor
    d_b: Tensor

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.learned = False
        self.transposed = isinstance(module, nn.Linear)  # weight (O, I), else (I, O)
        self.quantized = _kind(module) in (EIGHT_BITS, FOUR_BITS)
        if self.transposed:
            self.outputs, self.inputs = module.out_features, module.in_features
        else:
            self.inputs, self.outputs = module.weight.shape
        self._copy: Tensor | None = None

    def product(self, x: Tensor) -> Tensor:
        """The layer's own product with x (..., I), its bias added, without autograd."""
        if self.quantized:
            return product_of(self.module, x)
        rows = x.reshape(-1, x.shape[-1])
        return product(x, rows, self.weight(x.dtype), self.module.bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (I, O) in the dtype of products. A copy is kept until `refresh`.

        Of a quantised weight there is no copy, which would need the memory that it saves.
        """
        if self.quantized:
            return weight_of(self.module, dtype).t()
        own: Tensor = self.module.weight.detach()
        if own.dtype is not dtype:
            if self._copy is None or self._copy.dtype is not dtype:
                with torch.inference_mode(False):  # a tensor of that mode could not be refreshed
                    self._copy = own.to(dtype)
            own = self._copy
        return own.t() if self.transposed else own

    def refresh(self) -> None:
        """Gives the copy the weight's present values, in place: graphs read its memory.

        No counter of versions tells when: writes to `.data` move none.
        """
        copy = self._copy
        if copy is None:
            return
        own: Tensor = self.module.weight.detach()
        if own.device == copy.device and own.dtype is not copy.dtype:
            copy.copy_(own)
        else:
            self._copy = None


def chosen_layers(model: nn.Module, target: str | Sequence[str]) -> list[Layer]:
    """The layers that get factors, checked.

    target: "all-linear", or ends of names, each of a layer. The output head never gets factors.
    """
    ends = _ends(target)
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    found, adapted = [], []
    for name, module in model.named_modules():  # a module before those within it
        if not module._modules.keys().isdisjoint(_OF_ADAPTERS):
            adapted.append(f"{name}.")
        kind = _kind(module)
        if not (isinstance(module, nn.Linear) or kind == _CONV1D) or module is head:
            continue
        if ends is not None and not any(_is_end(end, name) for end in ends):
            continue
        if name.startswith(tuple(adapted)):
            raise ValueError(f"model: expected a model without adapters, got {name!r}")
        if type(module) is not nn.Linear and kind not in (_CONV1D, EIGHT_BITS, FOUR_BITS):
            raise ValueError(
                "model: expected linear layers of torch.nn.Linear, transformers' Conv1D, or "
                f"bitsandbytes' Linear8bitLt and Linear4bit, got {kind}: {name!r}"
            )
        if kind in (EIGHT_BITS, FOUR_BITS):
            check_quantized(name, module)
        if "forward" in module.__dict__:
            raise ValueError(f"model: expected layers with their own forward, got {name!r}")
        found.append(Layer(name, module))
    names = [layer.name for layer in found]
    lacking = [end for end in ends or () if not any(_is_end(end, name) for name in names)]
    if not found or lacking:
        of = lacking.pop(0) if lacking else target
        raise ValueError(f"target: expected linear layers in the model, got none for {of!r}")
    return found


def _ends(target: Any) -> tuple[str, ...] | None:
    """Ends of names; None for all layers."""
    if isinstance(target, str):
        if target != "all-linear":
            raise ValueError(f"target: expected 'all-linear' or names, got {target!r}")
        return None
    if not isinstance(target, Collection):
        raise TypeError(f"target: expected 'all-linear' or names, got {target!r}")
    for i, end in enumerate(target):
        if not isinstance(end, str):
            raise TypeError(f"target[{i}]: expected a name, got {end!r}")
    return tuple(target)


def _is_end(end: str, name: str) -> bool:
    return f".{name}".endswith(f".{end}")


def device_and_dtype(model: nn.Module, layers: list[Layer]) -> tuple[torch.device, torch.dtype]:
    """The device of the layers, and the dtype of their weights.

    Where all are quantised, products have the dtype of the model's other parameters.
    """
    devices = {layer.module.weight.device for layer in layers}
    dtypes = {layer.module.weight.dtype for layer in layers if not layer.quantized}
    if not dtypes:
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    known = {torch.float32, torch.bfloat16, torch.float16}
    if len(devices) != 1 or len(dtypes) != 1 or not dtypes <= known:
        found = sorted(map(str, devices | dtypes))
        raise ValueError(
            "model: expected layers on one device in float32, bfloat16 or float16, got "
            + ", ".join(found)
        )
    [device], [dtype] = devices, dtypes
    return device, dtype


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class _Call(NamedTuple):
    """How layers run: with the factors of which slots, on how many rows of tokens."""

    of: slice
    slots: int
    tokens: int | None  # in a pass with a backward half
    anchor: Tensor | None
    inputs: SharedInputs


class SlotForwards:
    """Runs layers with the factors of slots.

    scale: of the low-rank product. autocast: whether products are in bfloat16.
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
        with self._replaced(_Call(slice(first, first + slots), slots, None, None, SharedInputs())):
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
        of = slice(first, first + rows)
        with self._replaced(_Call(of, rows, rows * length, anchor, inputs)):
            yield

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
            tensor, call.anchor, layer, call.of, shared, self._scale, self._backend
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
        of: slice,
        shared: SharedInput,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        a, b = layer.a[of], layer.b[of]
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            y = layer.product(x)
            stacked = rows.view(len(a), -1, rows.shape[1])
            inner = low_rank_forward_(
                y.view(len(a), -1, y.shape[-1]), stacked, a, b, scale, backend
            )
        if anchor is not None:
            ctx.save_for_backward(stacked, *inner)
            ctx.layer, ctx.of, ctx.shared, ctx.scale = layer, of, shared, scale
            ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, ...]:
        x, *inner = ctx.saved_tensors
        layer: Layer = ctx.layer
        of: slice = ctx.of
        d = d.reshape(*x.shape[:2], -1).contiguous()
        d_x = None
        with torch.autocast(d.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                total, fresh = ctx.shared.total(x.shape[0] * x.shape[1], x.shape[2], x.device)
                add_product(total, d.flatten(0, 1), layer.weight(d.dtype).t(), fresh)
                d_x = total.view(x.shape)
            layer.learned = True
            to = Gradients(layer.d_a[of], layer.d_b[of], d_x, fresh=False)
            of_layer = (layer.a[of], layer.b[of], Inner(*inner))
            low_rank_backward(d, x, *of_layer, ctx.scale, to, ctx.backend)
        return (None,) * 7
