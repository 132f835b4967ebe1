# SPDX-License-Identifier: Apache-2.0
"""A model whose linear layers are bitsandbytes' of 4 bits (NF4, scales with scales)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def quantize_(model: Any) -> None:
    """Replaces every linear layer but the head, one at a time, where the model is."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in [*model.named_modules()]:
        if type(layer) is not nn.Linear or layer is model.get_output_embeddings():
            continue
        own = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = layer.weight.detach()
        own.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=own)
        own.weight = own.weight.to(weight.device)  # quantises
        own.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, own)
    model.is_loaded_in_4bit = True  # PEFT asks for it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
