# SPDX-License-Identifier: Apache-2.0
"""bfloat16 copies of some of a model's tensors, which passes read in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..native.torch_private import foreach_copy_

# The attributes under which PEFT's LoRA layers keep their factors. Others of its adapters keep
# theirs in containers of other kinds, and take them as they are.
_LORA_FACTORS = {
    "lora_A": nn.ModuleDict, "lora_B": nn.ModuleDict,
    "lora_embedding_A": nn.ParameterDict, "lora_embedding_B": nn.ParameterDict,
}  # fmt: skip
_WITH_MEMORY = (Tensor, nn.Parameter)


class PassCopies:
    """Copies of some tensors of a model. Inside `in_place` they are the tensors' `.data`.

    Updates are made to the tensors' own values, and these are restored. `refresh` writes the
    copies, and so does the kernel that updates the tensors.
    """

    def __init__(self, replaced: Iterable[Tensor], products: Iterable[Tensor] = ()) -> None:
        """products: tensors that stay in place; only the loss's product reads their copies."""
        self._products = set(products)
        self._data = {t: t.data for t in (*replaced, *self._products)}
        self._copies = {t: torch.empty_like(x, dtype=torch.bfloat16) for t, x in self._data.items()}

    def of(self, tensor: Tensor) -> Tensor | None:
        """The tensor's copy; None if it has none."""
        return self._copies.get(tensor)

    def data_of(self, tensor: Tensor) -> Tensor:
        """The tensor's own values, inside `in_place` too."""
        return self._data.get(tensor, tensor.data)

    def refresh(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Writes the copies of these tensors, or of all, from the tensors' own values."""
        chosen = [t for t in (self._copies if tensors is None else tensors) if t in self._copies]
        if chosen:
            with torch.no_grad():
                copies, data = [self._copies[t] for t in chosen], [self._data[t] for t in chosen]
                foreach_copy_(copies, data)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block passes read the copies. Gradients must be None at both ends."""
        replaced = [t for t in self._copies if t not in self._products]
        try:
            for tensor in replaced:
                tensor.data = self._copies[tensor]
            yield
        finally:
            for tensor in replaced:
                tensor.data = self._data[tensor]


def narrowed_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors that every pass reads in bfloat16, whatever its precision.

    These are the float16 tensors of a float16 model, plain attributes of modules among them: in a
    float16 backward pass gradients below 6e-8 would be 0, and activations beyond 65504 infinite.
    They are also the float32 factors of PEFT's adapters on a half-precision base, for which PEFT
    would cast activations to float32.
    """
    tensors = dict.fromkeys((*model.parameters(), *model.buffers()))
    base = _main_dtype(model)
    if base not in (torch.float16, torch.bfloat16):
        return []
    if base is torch.float16:  # but what shows a parameter's memory, which has one copy
        known = {t.untyped_storage().data_ptr() for t in tensors if type(t) in _WITH_MEMORY}
        attributes = (t for m in model.modules() for t in vars(m).values() if type(t) is Tensor)
        halves = (t for t in attributes if t.dtype is base and t.layout is torch.strided)
        own = (t for t in halves if t.untyped_storage().data_ptr() not in known)
        tensors |= dict.fromkeys(own)
    narrowed = {t for t in tensors if t.dtype is torch.float16 and base is torch.float16}
    narrowed |= {t for t in _lora_factors(model) if t.dtype in (torch.float32, torch.float16)}
    return [t for t in tensors if t in narrowed]


def autocast_weights(model: nn.Module) -> list[Tensor]:
    """The float32 parameters of linear layers alone, which autocast would cast in every pass."""
    cast: dict[Tensor, None] = {}
    others: set[Tensor] = set()
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        if _is_linear(module):
            cast |= dict.fromkeys(own)
        else:
            others.update(own)
    return [p for p in cast if p not in others and p.dtype is torch.float32]


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    names = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")
    return f"{kind.__module__}.{kind.__qualname__}" in names and "forward" not in module.__dict__


def _main_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating dtype with the most elements in the model."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _lora_factors(model: nn.Module) -> set[Tensor]:
    found: set[Tensor] = set()
    for module in model.modules():
        # DoRA takes the norm of the factors' product, which needs all bits.
        dora = getattr(module, "use_dora", None)
        if not hasattr(module, "base_layer") or not isinstance(dora, dict) or any(dora.values()):
            continue
        for name, kind in _LORA_FACTORS.items():
            held: Any = getattr(module, name, None)
            if isinstance(held, kind):
                found.update(held.parameters())
    return found
