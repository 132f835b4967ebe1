# SPDX-License-Identifier: Apache-2.0
"""Whether a model's own loss is that of next tokens.

Some causal models of transformers, such as Bart's decoder, score each label against the logits of
its own position. Trained with the ids as labels, they learn to repeat their input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import IGNORED, MODEL_ERRORS, at_least_float32, logits_of, trial

_ROWS = 256  # of logits that are widened at a time


def scores_in_place(output: Any, labels: Tensor) -> bool | None:
    """Whether the output's loss scores labels (1, T) in their own places; None if nothing tells.

    Nothing does where all logits are equal, as those of a last layer of zeros: both losses are the
    same then, and their gradients are not. What is neither that loss nor the next tokens', one with
    further terms, say, is not. This waits for the device.
    """
    logits = getattr(output, "logits", None)
    length = labels.shape[1]
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < length:
        return False
    loss = float(output.loss.detach())
    rows, targets = logits.detach()[0, -length:], labels[0]  # learned positions come before
    here = abs(_mean_loss(rows, targets) - loss)
    next_one = abs(_mean_loss(rows[:-1], targets[1:]) - loss)
    size = max(1.0, abs(loss))
    if not here <= (1e-4 if _is_wide(logits) else 0.02) * size:
        return False
    if max(here, next_one) <= 1e-5 * size:
        return None
    # Far from equally near.
    return here < next_one if min(here, next_one) <= 0.1 * max(here, next_one) else None


def scores_first_label(call: Callable[[Tensor], Any], ids: Tensor) -> bool | None:
    """As `scores_in_place`, whatever the logits are: no next-token loss scores the first label.

    call: the model's output, of labels (1, T). ids: (1, T), on their device.
    """
    labels = torch.full_like(ids, IGNORED)
    labels[:, 0] = ids[:, 0]
    try:
        with torch.no_grad(), trial(ids.device):
            output = call(labels)
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:  # its loss knows no labels that are not scored
        return None
    if output.logits.shape[1] != ids.shape[1]:  # a learned position before it predicts it
        return None
    loss = float(output.loss)  # NaN: a mean of nothing
    return False if math.isnan(loss) else True if 0.0 < loss < math.inf else None


def logits_of_tokens(output: Any, ids: Tensor) -> Tensor:
    """The logits (1, T, V) of ids (1, T). Learned positions come before, and have some, too."""
    length = ids.shape[1]
    logits = getattr(output, "logits", None)
    before = logits.shape[1] - length if isinstance(logits, Tensor) and logits.ndim == 3 else 0
    return logits_of(output, ids, max(0, before))[:, -length:]


def check_own_labels(name: str, labels: Tensor, ids: Tensor) -> None:
    """Raises ValueError for labels that such a model's own loss would rightly get: shifted ones.

    This waits for the device.
    """
    if not bool(((labels == ids) | (labels == IGNORED)).all()):
        raise ValueError(
            f"{name}: expected the token ids, or {IGNORED}, for a model whose own loss scores "
            "labels in their places, got others: hullkit takes the loss of next tokens"
        )


def sees_later_tokens(call: Callable[[Tensor], Any], ids: Tensor) -> bool:
    """Whether the logits of ids (1, T) but for the last depend on the last.

    call: the model, of ids that it may write to. Both calls get the same random numbers.
    """
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] == 0).to(ids.dtype)], 1)
    found = []
    for part in (ids.clone(), changed):
        # Each block puts the state of random numbers back, so that the second begins as the first.
        with torch.no_grad(), trial(ids.device):
            found.append(logits_of_tokens(call(part), ids)[0, :-1])
    one, other = found
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
