# SPDX-License-Identifier: Apache-2.0
"""Linear layers of bitsandbytes, whose weights are kept in 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..language_model.quantized_layouts import first_layout

EIGHT_BITS = "bitsandbytes.nn.modules.Linear8bitLt"
FOUR_BITS = "bitsandbytes.nn.modules.Linear4bit"


def check_quantized(name: str, module: Any) -> None:
    """Refuses a layer of bitsandbytes whose weight has not been quantised."""
    if module.weight.dtype.is_floating_point:
        raise ValueError(
            f"model: expected a quantised weight in {name!r}, got {module.weight.dtype}: the layer "
            "quantises it when it moves to a device, and Linear8bitLt(has_fp16_weights=True) never"
        )


def product_of(module: Any, x: Tensor) -> Tensor:
    """What the layer computes of x, without autograd. It is no view: models write to it."""
    y: Tensor = type(module).forward(module, x)
    return y.clone() if y._is_view() else y


def weight_of(module: Any, dtype: torch.dtype) -> Tensor:
    """The layer's weight (O, I), dequantised into new memory."""
    from bitsandbytes import functional

    weight = module.weight
    if weight.dtype is torch.int8:
        # The first forward moves the rows' scales from the weight to the layer's state.
        scales = weight.SCB if module.state.SCB is None else module.state.SCB
        found: Tensor = functional.int8_vectorwise_dequant(weight.detach(), scales)
    else:
        found = functional.dequantize_4bit(*first_layout(weight))  # nothing does the second
    return found.to(dtype)
