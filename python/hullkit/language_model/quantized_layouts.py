# SPDX-License-Identifier: Apache-2.0
"""The second layout that bitsandbytes has for 4-bit weights on some CPUs (AVX512-BF16).

A layer in eval mode takes it up for good in a pass without a gradient, and multiplies in bfloat16
then. The layout rounds the weights' scales, has no gradient, and only part of it lies in the
weight: the rest is in an object beside it. So the layout must not change while a model is adapted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_TAKES_IT = "support_avx512bf16_for_cpu"
_HAS_IT = "packing_format_for_cpu"


def changing_layouts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers that may take up the second layout."""
    return [module for module in modules if module.__dict__.get(_TAKES_IT)]


def set_changing(modules: Iterable[nn.Module], may: bool) -> None:
    """Whether these layers may take it up from now on."""
    for module in modules:
        module.__dict__[_TAKES_IT] = may


def to_first_layout(weight: Any) -> None:
    """Gives a 4-bit weight its first layout back, as `state_dict` does. Scales stay rounded."""
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, _HAS_IT, False):
        from bitsandbytes import functional

        back = functional._convert_weight_packed_for_cpu_inverse
        weight.data, weight.quant_state = back(weight.data, state)
