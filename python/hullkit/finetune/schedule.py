# SPDX-License-Identifier: Apache-2.0
"""Gradient reuse: which examples pass through the model, and how many updates each pass serves."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._arrays import refuse_mask
from .._checks import check_below_2_63, check_int

_MOST_PASSES = 1 << 20  # more are a mistake, and a list of them would fill the memory


class Reuse(NamedTuple):
    """One burst: the gradient of `example` is computed once and serves `num_steps` updates.

    Attributes:
        example: int, its place among the examples.
        num_steps: int >= 1.

    >>> import hullkit
    >>> hullkit.Reuse(example=3, num_steps=2)
    Reuse(example=3, num_steps=2)
    """

    example: int
    num_steps: int


def reuse_schedule(counts: Any, refresh_interval: int = 2) -> list[Reuse]:
    """Splits every example's count into bursts of up to `refresh_interval` updates on one gradient.

    The gradient of an example with count c is computed at its updates 0, r, 2r, ... and reused in
    between. All updates of an example are consecutive. So an example has ceil(c / r) bursts: r
    updates each, and c - r * (ceil(c / r) - 1) in the last one. Examples come in the order of
    `counts`; a selection has them by falling weight. A count of 0 is skipped, and so is the padding
    of a selection.

    Equivalent to: `[Reuse(i, min(r, c - t)) for i, c in enumerate(counts) for t in range(0, c, r)]`

    Args:
        counts: (n,) integers >= 0, at least one of them > 0: a sequence, NumPy array or tensor.
        refresh_interval: r >= 1, the most updates with one gradient. 1 is ordinary finetuning.

    Returns:
        A list of sum_i ceil(counts_i / r) :class:`Reuse`, one for each forward and backward pass.
        Their `num_steps` sum to `sum(counts)`.

    Raises:
        TypeError: `counts` is no sequence or holds anything but integers (bool included), or
            `refresh_interval` is no integer.
        ValueError: `counts` is not one-dimensional, is empty, has a negative entry or only zeros,
            or `refresh_interval` < 1, or there would be more than 2^20 passes.

    >>> import hullkit
    >>> hullkit.reuse_schedule([3, 0, 1], refresh_interval=2)
    [Reuse(example=0, num_steps=2), Reuse(example=0, num_steps=1), Reuse(example=2, num_steps=1)]

    Cost: O(n + number of bursts). Counts on a GPU are copied to the host, which waits for them.

    Source: HullFT, arXiv 2605.30337, gradient caching.
    """
    interval = check_int("refresh_interval", refresh_interval, 1)
    checked = check_counts(counts)
    passes = sum(-(-count // interval) for count in checked)
    if passes > _MOST_PASSES:
        raise ValueError(f"counts: expected at most {_MOST_PASSES} passes, got {passes}")
    return [
        Reuse(example, min(interval, count - start))
        for example, count in enumerate(checked)
        for start in range(0, count, interval)
    ]


def check_counts(counts: Any) -> list[int]:
    """`counts` as a list of ints >= 0 with a positive sum, or the error that names it."""
    refuse_mask("counts", counts)
    # Only NumPy arrays and tensors have a rank.
    rank = getattr(counts, "ndim", None)
    if rank is not None and rank != 1:
        raise ValueError(f"counts: expected rank 1, got shape {tuple(counts.shape)}")
    values = counts.tolist() if hasattr(counts, "tolist") else counts
    if not isinstance(values, (list, tuple, range)):
        raise TypeError(f"counts: expected a 1-D sequence of integers, got {_kind(counts)}")
    result = []
    for i, entry in enumerate(values):
        if isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) != 0:
            raise ValueError(f"counts: expected rank 1, got a sequence at counts[{i}]")
        value = _integer(entry)
        if value is None:
            raise TypeError(f"counts: expected integers, got {_kind(entry)} at counts[{i}]")
        if value < 0:
            raise ValueError(f"counts: expected entries >= 0, got counts[{i}] = {value}")
        check_below_2_63(f"counts[{i}]", value)
        result.append(value)
    if sum(result) == 0:
        got = f"{len(result)} zeros" if result else "an empty sequence"
        raise ValueError(f"counts: expected a total of at least 1, got {got}")
    return result


def _integer(value: Any) -> int | None:
    """A Python int, NumPy integer or 0-d integer tensor as an int; None for anything else."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    # Python counts bool as int, but a mask given for counts is a mistake.
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _kind(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + ("" if dtype is None else f" of dtype {dtype}")
