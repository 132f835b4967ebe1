# SPDX-License-Identifier: Apache-2.0
"""Gradient reuse as the definition states it: update by update."""

from __future__ import annotations

from collections.abc import Sequence


def updates(counts: Sequence[int], refresh_interval: int = 2) -> list[tuple[int, bool]]:
    """(example, whether its gradient is computed anew) for each of the sum(counts) updates."""
    result = []
    for example, count in enumerate(counts):
        for update in range(count):
            result.append((example, update % refresh_interval == 0))
    return result
