# SPDX-License-Identifier: Apache-2.0
"""Trying a module, perhaps with small random layers as its parts, to find what it computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def random_linear(columns: int, rows: int, random: torch.Generator) -> nn.Linear:
    """A layer without a bias, whose weight has elements of about 1."""
    layer = nn.Linear(columns, rows, bias=False, device="cpu", dtype=torch.float32)
    layer.weight.data = random_tensor(random, rows, columns)
    return layer


def random_tensor(random: torch.Generator, *shape: int) -> Tensor:
    """float32 on the CPU, whatever torch makes tensors of by default. Elements are about 1."""
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")


def column(numbers: Sequence[float]) -> Tensor:
    """A factor for each row, float32 on the CPU."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")[:, None]


def trial(module: nn.Module, x: Tensor, parts: Mapping[str, nn.Module] | None = None) -> Any:
    """What the forward of the module's class returns for x, with these parts instead of its own.

    The module stays as it is, and nobody who watches it is told.
    """
    tried = copy.copy(module)  # a forward may count its calls
    if parts is not None:
        tried.__dict__["_modules"] = {**module._modules, **parts}
    with torch.no_grad():
        return type(module).forward(tried, x)
