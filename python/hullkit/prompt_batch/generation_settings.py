# SPDX-License-Identifier: Apache-2.0
"""What options of transformers' `generate` and settings of a model say."""

from __future__ import annotations

from typing import Any

from torch import nn

FACTORS = {"length_penalty", "num_beams", "num_return_sequences", "repetition_penalty"}
# Rotary positions that depend on the longest row.
_OF_LONGEST = {"dynamic", "longrope"}


def is_off(name: str, value: Any) -> bool:
    """Whether an option or a setting changes nothing."""
    if value is None or value is False:
        return True
    if type(value) in (int, float):
        return not name.endswith("_token_id") and value == (1 if name in FACTORS else 0)
    return type(value) in (list, tuple, dict) and not value


def of_longest(module: nn.Module) -> bool:
    """Whether a row's positions change with the longest row."""
    return not _OF_LONGEST.isdisjoint(_rope_types(module))


def keeps_longest(module: nn.Module) -> bool:
    """Whether positions depend on the longest text so far, too."""
    return "dynamic" in _rope_types(module)


def _rope_types(module: nn.Module) -> list[Any]:
    kinds = getattr(module, "rope_type", None)
    return [*kinds.values()] if isinstance(kinds, dict) else [kinds]
