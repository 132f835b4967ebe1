# SPDX-License-Identifier: Apache-2.0
"""Small models with bitsandbytes' layers of 8 and 4 bits, and the same with ordinary ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _models import llama
from _prompts import DEVICE
from hullkit.prompt_batch.quantized import weight_of
from torch import nn

bitsandbytes = pytest.importorskip("bitsandbytes", reason="not installed")


def base(kind: str) -> Any:
    """A small model. In 4 bits its widths are multiples of the 64 weights that share a scale:
    on a GPU bitsandbytes warns of others."""
    return llama() if kind == "int8" else llama(hidden=64, intermediate=128)


def quantized(kind: str, nested: bool = True) -> Any:
    """A small model whose linear layers but the head are of bitsandbytes.

    nested: whether scales of 4-bit weights have scales of their own.
    """
    model = base(kind)
    for name, layer in [*model.named_modules()]:
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        sizes = layer.in_features, layer.out_features
        own: Any
        if kind == "int8":
            own = bitsandbytes.nn.Linear8bitLt(
                *sizes, bias=False, has_fp16_weights=False, threshold=6.0
            )
        else:
            own = bitsandbytes.nn.Linear4bit(
                *sizes,
                bias=False,
                compute_dtype=torch.float32,
                quant_type=kind,
                compress_statistics=nested,
            )
        own.load_state_dict({"weight": layer.weight.detach()})
        own.requires_grad_(False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, own)
    return model.to(DEVICE)


def dequantized(model: nn.Module, kind: str) -> Any:
    """The same model with ordinary layers."""
    dense = base(kind).to(DEVICE)
    for name, layer in model.named_modules():
        if type(layer).__module__.startswith("bitsandbytes"):
            with torch.no_grad():
                dense.get_submodule(name).weight.copy_(weight_of(layer, torch.float32))
    return dense
