# SPDX-License-Identifier: Apache-2.0
"""The second layout that bitsandbytes has for 4-bit weights on some CPUs (AVX512-BF16).

A layer in eval mode takes it up for good in a pass without a gradient, and multiplies in bfloat16
then. The layout rounds the weights' scales, has no gradient, and only part of it lies in the
weight: the rest is in an object beside it. So the layout must not change while a model is adapted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_TAKES_IT = "support_avx512bf16_for_cpu"
_HAS_IT = "packing_format_for_cpu"


def first_layout(weight: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight's data and its quant_state in the first layout. The weight stays as it is."""
    data: Tensor = weight.data
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, _HAS_IT, False):
        return data, state
    from bitsandbytes import functional

    data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    if state.absmax.ndim == 2:  # scales without scales of their own are left as they lie
        state.absmax = state.absmax.t().reshape(-1).to(torch.float32)
    return data, state


class FirstLayouts:
    """Holds 4-bit weights in their first layout. `put_back` gives back what was, to the bit."""

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []  # that would take up the second one
        self._before: list[tuple[Any, Tensor, Any]] = []

    def take(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if module.__dict__.get(_TAKES_IT):
                self._layers.append(module)
                module.__dict__[_TAKES_IT] = False
            weights: Iterable[Any] = module._parameters.values()
            for weight in weights:
                if getattr(getattr(weight, "quant_state", None), _HAS_IT, False):
                    self._before.append((weight, weight.data, weight.quant_state))
                    weight.data, weight.quant_state = first_layout(weight)

    def put_back(self) -> None:
        """May be called again."""
        for weight, data, state in self._before:
            weight.data, weight.quant_state = data, state
        for module in self._layers:
            module.__dict__[_TAKES_IT] = True
        self._before, self._layers = [], []
