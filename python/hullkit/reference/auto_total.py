# SPDX-License-Identifier: Apache-2.0
"""How many updates a prompt gets where nobody says."""

from __future__ import annotations


def ladder(max_total: int) -> list[int]:
    """The totals to choose from: 1, 2, 4, 6 and 10 tenths of the largest, rounded up.

    >>> from hullkit.reference import ladder
    >>> ladder(50)
    [5, 10, 20, 30, 50]
    """
    return sorted({-(-max_total * tenths // 10) for tenths in (1, 2, 4, 6, 10)})


def auto_total(residual_norm: float, max_total: int, alpha: float) -> int:
    """The first of the ladder where what no multiset can reconstruct exceeds 1 / (alpha total).

    SIFT's rule for its standard deviation, taken for the residual.

    Args:
        residual_norm: the length of the residual at max_total.
        max_total: the most updates, >= 1.
        alpha: > 0; a larger one spends less.
    Returns:
        The number of updates, at most max_total.

    >>> import hullkit.reference as reference
    >>> reference.auto_total(0.5, 50, alpha=0.08)
    30
    """
    for total in ladder(max_total):
        if residual_norm > 1.0 / (alpha * total):
            return total
    return max_total
