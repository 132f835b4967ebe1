# SPDX-License-Identifier: Apache-2.0
"""Whether a model's own loss is that of next tokens.

Some causal models of transformers, such as Bart's decoder, score each label against the logits of
its own position. Trained with the ids as labels, they learn to repeat their input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import IGNORED, at_least_float32, logits_of

_ROWS = 256  # of logits that are widened at a time


def scores_in_place(output: Any, labels: Tensor) -> bool | None:
    """Whether the output's loss scores labels (1, T) in their own places; None if nothing tells.

    What is neither that loss nor the next tokens', one with further terms, say, is not. This waits
    for the device.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != labels.shape:
        return False
    loss = float(output.loss.detach())
    rows, targets = logits.detach()[0], labels[0]
    here = abs(_mean_loss(rows, targets) - loss)
    next_one = abs(_mean_loss(rows[:-1], targets[1:]) - loss)
    size = max(1.0, abs(loss))
    if not here <= (1e-4 if _is_wide(logits) else 0.02) * size:
        return False
    if max(here, next_one) <= 1e-5 * size:
        return None
    # Far from equally near.
    return here < next_one if min(here, next_one) <= 0.1 * max(here, next_one) else None


def sees_later_tokens(call: Callable[..., Any], ids: Tensor, options: dict[str, Any]) -> bool:
    """Whether the logits of ids (1, T) but for the last depend on the last."""
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] == 0).to(ids.dtype)], 1)
    with torch.no_grad():
        one, other = (
            logits_of(call(part, **options), part)[0, : ids.shape[1] - 1] for part in (ids, changed)
        )
    bound = 1e-4 if _is_wide(one) else 0.02
    return bool((one - other).abs().max() > bound * one.abs().max())


def _is_wide(logits: Tensor) -> bool:
    return logits.dtype in (torch.float32, torch.float64)


def _mean_loss(rows: Tensor, targets: Tensor) -> float:
    count = int((targets != IGNORED).sum())
    total = 0.0
    for at in range(0, len(rows), _ROWS):
        part = at_least_float32(rows[at : at + _ROWS])
        own = F.cross_entropy(part, targets[at : at + _ROWS], ignore_index=IGNORED, reduction="sum")
        total += float(own)
    return total / max(1, count)
