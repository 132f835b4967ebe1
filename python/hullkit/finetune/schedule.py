"""Gradient reuse: when each example passes through the model, and how many updates that serves."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._checks import check_below_2_63, check_int
from ..selection._arrays import refuse_mask


class Reuse(NamedTuple):
    """One burst: compute the gradient of `example` once, then make `num_steps` updates with it."""

    example: int
    num_steps: int


def reuse_schedule(counts: Any, refresh_interval: int = 2) -> list[Reuse]:
    """Split every example's count into bursts of up to `refresh_interval` updates on one gradient.

    The gradient of an example with count c is computed at its updates 0, r, 2r, ... and reused in
    between. All updates of an example are consecutive, so its schedule is ceil(c / r) bursts: r
    updates each, the last one c - r * (ceil(c / r) - 1). Examples come in the order of `counts`
    (a selection's order is by falling weight: heaviest first); a count of 0 is skipped, and with
    it the padding of a selection.

    Equivalent to: `[Reuse(i, min(r, c - t)) for i, c in enumerate(counts) for t in range(0, c, r)]`

    Args:
        counts: (n,) integers >= 0, at least one of them > 0: a sequence, NumPy array or tensor.
        refresh_interval: r >= 1, updates per gradient. 1 is ordinary finetuning.

    Returns:
        sum_i ceil(counts_i / r) bursts. Their `num_steps` sum to `sum(counts)`; their number is the
        number of forward-backward passes.

    Raises:
        TypeError: `counts` is no sequence or holds anything but integers (bool included), or
            `refresh_interval` is no integer.
        ValueError: `counts` is not one-dimensional, is empty, has a negative entry or only zeros,
            or `refresh_interval` < 1.

    Complexity: O(n + number of bursts). Counts on a GPU are copied to the host first (a sync).

    Source: HullFT, arXiv 2605.30337, gradient caching.
    """
    interval = check_int("refresh_interval", refresh_interval, 1)
    return [
        Reuse(example, min(interval, count - start))
        for example, count in enumerate(check_counts(counts))
        for start in range(0, count, interval)
    ]


def check_counts(counts: Any) -> list[int]:
    """`counts` as a list of ints >= 0 with a positive sum, or the error that names it."""
    refuse_mask("counts", counts)
    # NumPy arrays and tensors, on any device.
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
    """The int that `value` is (a Python int, NumPy integer or 0-d integer tensor), else None."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    # bool is an int to Python; a mask in the place of counts is a mistake.
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _kind(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + ("" if dtype is None else f" of dtype {dtype}")
