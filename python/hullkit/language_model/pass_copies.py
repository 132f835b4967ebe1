"""bfloat16 copies of a model's tensors, which passes read in place of the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..native.torch_private import foreach_copy_

# The factors of PEFT's layers, by the names under which these keep them.
_LORA_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


class PassCopies:
    """Copies of some tensors of a model; inside `in_place` they are the tensors' `.data`.

    The model's own tensors stay what updates are made to and what is put back. Copies are written
    by `refresh`, and by the kernel that updates the tensors.
    """

    def __init__(self, replaced: Iterable[Tensor], products: Iterable[Tensor] = ()) -> None:
        """products: tensors that stay in place, whose copies only products are given."""
        self._products = set(products)
        self._data = {t: t.data for t in (*replaced, *self._products)}
        self._copies = {t: torch.empty_like(x, dtype=torch.bfloat16) for t, x in self._data.items()}

    def of(self, tensor: Tensor) -> Tensor | None:
        return self._copies.get(tensor)

    def data_of(self, tensor: Tensor) -> Tensor:
        """The tensor's own values, also inside `in_place`."""
        return self._data.get(tensor, tensor.data)

    def refresh(self, tensors: Iterable[Tensor] | None = None) -> None:
        """From the tensors' values, of all or of these."""
        chosen = [t for t in (self._copies if tensors is None else tensors) if t in self._copies]
        if chosen:
            with torch.no_grad():
                copies, data = [self._copies[t] for t in chosen], [self._data[t] for t in chosen]
                foreach_copy_(copies, data)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gradients must be None on entry, and on leaving."""
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

    float16 ones of a float16 model: gradients below 6e-8 would be 0 in a float16 backward pass, and
    activations beyond 65504 infinite. float32 factors of PEFT's adapters on a half-precision base:
    PEFT would cast activations to float32 for each thin product.
    """
    tensors = dict.fromkeys((*model.parameters(), *model.buffers()))
    base = _main_dtype(model)
    if base not in (torch.float16, torch.bfloat16):
        return []
    narrowed = {t for t in tensors if t.dtype is torch.float16 and base is torch.float16}
    narrowed |= {t for t in _lora_factors(model) if t.dtype in (torch.float32, torch.float16)}
    return [t for t in tensors if t in narrowed]


def autocast_weights(model: nn.Module) -> list[Tensor]:
    """float32 parameters that autocast would cast in every pass: those of linear layers alone."""
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
    """The floating dtype of most of the model's elements."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _lora_factors(model: nn.Module) -> set[Tensor]:
    found: set[Tensor] = set()
    for module in model.modules():
        # DoRA takes the norm of the product of the factors: not in fewer bits.
        if not hasattr(module, "base_layer") or any(getattr(module, "use_dora", {}).values()):
            continue
        for name in _LORA_FACTORS:
            held: Any = getattr(module, name, None)
            if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
                found.update(held.parameters())
    return found
