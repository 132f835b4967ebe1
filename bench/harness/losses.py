# SPDX-License-Identifier: Apache-2.0
"""What a query must have computed before its time counts: the losses of its passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HALF = 2e-2  # relative: passes in half precision beside others, after the same updates


def agree(losses: Sequence[float], wanted: Sequence[float], within: float = HALF) -> None:
    """AssertionError for a query that lost a pass, diverged, or learned something else.

    wanted: of the first passes, or of all.
    """
    if not all(map(math.isfinite, losses)) or len(losses) < len(wanted):
        raise AssertionError(f"expected {len(wanted)} finite losses, got {[*losses]}")
    for got, expected in zip(losses, wanted):  # noqa: B905 wanted may be fewer
        if abs(got - expected) > within * abs(expected):
            raise AssertionError(f"expected losses near {[*wanted]}, got {[*losses]}")


@torch.no_grad()
def untrained(model: Any, ids: Tensor) -> float:
    """The model's own loss of a text, which the first pass over it must find."""
    device = next(model.parameters()).device
    ids = ids.to(device)[None]
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def fingerprint(model: torch.nn.Module) -> list[int]:
    """Numbers of the weights' bits: after a query they must be as before."""
    weights = (p.detach().flatten().view(torch.uint8) for p in model.parameters())
    # In parts: torch makes an int64 of every byte.
    return [int(part.sum(dtype=torch.int64)) for weight in weights for part in weight.split(2**24)]
