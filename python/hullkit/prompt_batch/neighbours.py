# SPDX-License-Identifier: Apache-2.0
"""Whether a model's rows can share a pass: they must change neither each other nor feel padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TOKENS = 64  # of the text that is tried
# Relative, between logits that should be the same. Whatever mixes rows or looks ahead moves them by
# a part of their size that does not depend on the dtype. Neither bound is derived from a model.
_BOUND, _BOUND_OF_HALVES = 1e-3, 0.1

Logits = Callable[[Tensor], Tensor]  # of ids (R, T): (R, T, V), the model's own


def check_rows(logits: Logits, text: Tensor) -> None:
    """Raises ValueError if another row of the batch changes what the model says of a text (T,)."""
    text = text[:_TOKENS]
    both = torch.stack([text, _others(text)])
    apart = _difference(logits(text[None])[0], logits(both)[0])
    if apart > _BOUND_OF_HALVES:  # in full float32 texts have passes of their own
        raise ValueError(
            "model: expected rows of a batch that do not change each other, got logits that differ "
            f"by {apart:.1e} beside another row"
        )


def feels_padding(logits: Logits, text: Tensor, exact: bool) -> bool:
    """Whether a tail of other tokens changes what the model says of the tokens before it.

    It does in a model that is not causal. A model that takes no longer text counts as one.

    exact: whether products are in full float32.
    """
    own = text[: max(2, min(_TOKENS, len(text)) // 2)]
    alone = logits(own[None])[0]
    try:
        padded = logits(torch.cat([own, _others(own)])[None])[0, : len(own)]
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return True
    return _difference(alone, padded) > (_BOUND if exact else _BOUND_OF_HALVES)


def _others(text: Tensor) -> Tensor:
    """As many tokens, each another one: among equal ones nothing would show."""
    return torch.where(text == 0, 1, 0)


def _difference(logits: Tensor, other: Tensor) -> float:
    """Relative, of all logits together."""
    logits, other = logits.double(), other.double()
    return float((logits - other).norm() / logits.norm().clamp_min(1e-30))
