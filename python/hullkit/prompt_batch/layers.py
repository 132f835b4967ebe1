# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a frozen model that get factors of slots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..language_model.eval_mode import EvalMode
from ..language_model.interface import MODEL_ERRORS, is_compiled, is_prompt_learning
from ..language_model.product_settings import matmul_precision
from ..language_model.products import product
from .quantized import EIGHT_BITS, FOUR_BITS, check_quantized, product_of, weight_of

_CONV1D = "transformers.pytorch_utils.Conv1D"
_OF_ADAPTERS = ("base_layer", "lora_A")  # PEFT's names of what its layers consist of


class Layer:
    """A linear layer of the model. `SlotFactors` sets its factors.

    a (K, R, I), b (K, O, R): what products read. d_a, d_b: float32, where gradients go. learned:
    whether the latest pass has written them. readers: the layers whose factors a pass multiplies
    with this layer's input when this layer is called, for they read it too.
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
        self.readers: tuple[Layer, ...] = (self,)
        self._copies: dict[torch.dtype, Tensor] = {}

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = self.module.bias
        return found

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        weight: Tensor = self.module.weight
        return weight.dtype, weight.device

    def product(self, x: Tensor) -> Tensor:
        """The layer's own product with x (..., I), its bias added, without autograd."""
        if self.quantized:
            return product_of(self.module, x)
        rows = x.reshape(-1, x.shape[-1])
        return product(x, rows, self.weight(x.dtype), self.bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (I, O) in the dtype of products. Copies are kept, for graphs read them.

        Of a quantised weight there is no copy, which would need the memory that it saves. Nor is
        there one of a weight that a hook of the layer makes anew, such as weight_norm's.
        """
        if self.quantized:
            return weight_of(self.module, dtype).t()
        own: Tensor = self.module.weight.detach()
        if own.dtype is not dtype:
            if "weight" not in self.module._parameters:
                own = own.to(dtype)
            else:
                if dtype not in self._copies:
                    with torch.inference_mode(False):  # one of that mode could not be refreshed
                        self._copies[dtype] = own.to(dtype)
                own = self._copies[dtype]
        return own.t() if self.transposed else own

    def multiplies(self, x: Tensor) -> bool:
        """Whether the layer's product with x is one with `weight` in x's dtype."""
        if _kind(self.module) == EIGHT_BITS:
            return False  # of integers
        return not self.quantized or self.module.compute_dtype in (None, x.dtype)

    def weight_or_shape(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I); without memory where `of_weight` makes it anew each time."""
        if self.quantized:
            return torch.empty(self.outputs, self.inputs, dtype=dtype, device="meta")
        return self.rows_of_weight(dtype)

    def of_weight(self, dtype: torch.dtype) -> Callable[[], Tensor] | None:
        return partial(self.rows_of_weight, dtype) if self.quantized else None

    def rows_of_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in the dtype of products."""
        return self.weight(dtype).t()

    def refresh(self) -> None:
        """Gives copies the weight's present values, in place: graphs read their memory.

        No counter of versions tells when: writes to `.data` move none.
        """
        for dtype, copy in [*self._copies.items()]:
            own: Tensor = self.module.weight.detach()
            if own.device == copy.device and own.dtype is not dtype:
                copy.copy_(own)
            else:
                del self._copies[dtype]


def chosen_layers(model: nn.Module, target: str | Sequence[str]) -> list[Layer]:
    """The layers that get factors, checked.

    target: "all-linear", or ends of names, each of a layer. The output head never gets factors.
    """
    ends = _ends(target)
    _check_prompts(model)
    if is_compiled(model):
        raise ValueError(
            "model: expected one that torch.compile has not changed, got a compiled one: passes "
            "are captured without it"
        )
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
        if not _takes(module):
            others = (n for n, m in model.named_modules() if m is not head and _takes(m))
            other = next(others, None)
            raise ValueError(
                "model: expected linear layers that compute what torch.nn.Linear does, "
                "transformers' Conv1D, or bitsandbytes' Linear8bitLt and Linear4bit, got "
                f"{kind}: {name!r}" + (f". `target` may name others, as {other!r}" if other else "")
            )
        if kind in (EIGHT_BITS, FOUR_BITS):
            check_quantized(name, module)
        if "forward" in module.__dict__:
            raise ValueError(f"model: expected layers with their own forward, got {name!r}")
        found.append(Layer(name, module))
    names = [layer.name for layer in found]
    lacking = [end for end in ends or () if not any(_is_end(end, name) for name in names)]
    of_head = [name for name, module in model.named_modules() if module is head]
    if any(_is_end(end, name) for end in lacking for name in of_head):
        raise ValueError(
            f"target: expected layers within the model, got the output head, {of_head[0]!r}, which "
            "gets no factors"
        )
    if not found or lacking:
        of = lacking.pop(0) if lacking else target
        raise ValueError(f"target: expected linear layers in the model, got none for {of!r}")
    return found


def _check_prompts(model: nn.Module) -> None:
    """Refuses learned prompts of PEFT that take rows beside the tokens'. Prefixes take none."""
    for module in filter(is_prompt_learning, model.modules()):
        config: Any = module.active_peft_config
        kind = config.peft_type
        if kind not in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(
                "model: expected one without a learned prompt before the tokens, which would be "
                f"rows of no slot, got PEFT's {getattr(kind, 'value', kind)}; prefix tuning is fine"
            )


def _ends(target: Any) -> tuple[str, ...] | None:
    """Ends of names; None for all layers."""
    if isinstance(target, str):
        if target != "all-linear":
            raise ValueError(
                f"target: expected 'all-linear' or a list of names, got the str {target!r}"
            )
        return None
    if not isinstance(target, Collection):
        raise TypeError(f"target: expected 'all-linear' or names, got {target!r}")
    for i, end in enumerate(target):
        if not isinstance(end, str):
            raise TypeError(f"target[{i}]: expected a name, got {end!r}")
    return tuple(target)


def _is_end(end: str, name: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _takes(module: nn.Module) -> bool:
    """Whether the module is a linear layer that gets factors."""
    if type(module) is nn.Linear or _kind(module) in (_CONV1D, EIGHT_BITS, FOUR_BITS):
        return True
    # torch.nn.MultiheadAttention reads the weight of such a layer without a call of it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if module._modules or not module._parameters.keys() <= {"weight", "bias"}:
        return False  # has more to it, as adapters do
    return type(module).forward is nn.Linear.forward or _computes_the_product(module)


def _computes_the_product(module: nn.Linear) -> bool:
    """Whether the forward of such a class is that of `nn.Linear`, on a few random rows."""
    weight = module.weight
    random = torch.Generator(weight.device).manual_seed(0)
    shape, of = (2, 32, module.in_features), {"device": weight.device, "dtype": weight.dtype}
    try:
        with EvalMode(module), matmul_precision("float32"):
            x = torch.randn(shape, generator=random, **of)  # type: ignore[call-overload]
            found: Any = type(module).forward(module, x)
            wanted = nn.functional.linear(x, weight, module.bias)
            if type(found) is not Tensor or (found.dtype, found.shape) != (x.dtype, wanted.shape):
                return False
            # Halves may be rounded after the product and after the sum: 0.4 of eps. Inputs of 8
            # bits would be 0.9 of bfloat16's. In float32 sums have another order.
            bound = torch.finfo(x.dtype).eps * (0.6 if x.dtype.itemsize == 2 else 64.0)
            found, wanted = found.double(), wanted.double()
            return bool((found - wanted).norm() <= bound * wanted.norm())
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:
        return False


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
