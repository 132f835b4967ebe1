# SPDX-License-Identifier: Apache-2.0
"""reuse_schedule against the update-by-update definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hullkit import Reuse, reuse_schedule
from hullkit.reference.schedule import updates
from hypothesis import given
from hypothesis import strategies as st


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    st.integers(1, 25),
)
def test_is_the_definition(counts: list[int], refresh_interval: int) -> None:
    schedule = reuse_schedule(counts, refresh_interval)
    # Each burst is one fresh gradient and then num_steps - 1 updates that reuse it.
    spelled = [(b.example, step == 0) for b in schedule for step in range(b.num_steps)]
    assert spelled == updates(counts, refresh_interval)
    assert len(schedule) == sum(-(-c // refresh_interval) for c in counts)


def test_bursts_in_order_with_a_short_last_one() -> None:
    assert reuse_schedule([5, 0, 2, 1]) == [
        Reuse(0, 2),
        Reuse(0, 2),
        Reuse(0, 1),
        Reuse(2, 2),
        Reuse(3, 1),
    ]
    assert reuse_schedule([2, 1], 1) == [(0, 1), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    "counts",
    [
        (3, 0, 1),
        np.array([3, 0, 1], dtype=np.uint8),
        [np.int64(3), np.int32(0), torch.tensor(1)],
        torch.tensor([3, 0, 1]),
        torch.tensor([3, 9, 0, 9, 1, 9], dtype=torch.int16)[::2],
    ],
    ids=["tuple", "numpy", "scalars", "torch", "strided"],
)
def test_kinds_of_counts(counts: object) -> None:
    schedule = reuse_schedule(counts)
    assert schedule == [(0, 2), (0, 1), (2, 1)]
    assert all(type(value) is int for burst in schedule for value in burst)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([2, -1], ValueError, r"counts: expected entries >= 0, got counts\[1\] = -1"),
        (torch.tensor([2, -1]), ValueError, r"counts: .* >= 0, got counts\[1\] = -1"),
        ([], ValueError, "counts: expected a total of at least 1, got an empty sequence"),
        (torch.zeros(3, dtype=torch.int64), ValueError, "counts: .* at least 1, got 3 zeros"),
        ([[1, 2]], ValueError, r"counts: expected rank 1, got a sequence at counts\[0\]"),
        ([torch.tensor([1])], ValueError, r"counts: expected rank 1, got a sequence"),
        (torch.ones(2, 2, dtype=torch.int64), ValueError, r"rank 1, got shape \(2, 2\)"),
        (np.array(3), ValueError, r"counts: expected rank 1, got shape \(\)"),
        ([1, 2.0], TypeError, r"counts: expected integers, got float at counts\[1\]"),
        ([True, 1], TypeError, r"counts: expected integers, got bool at counts\[0\]"),
        (torch.tensor([True]), TypeError, "counts: expected integers, got bool"),
        (np.array([1.0]), TypeError, "counts: expected integers, got float"),
        ([None], TypeError, "counts: expected integers, got NoneType"),
        (7, TypeError, "counts: expected a 1-D sequence of integers, got int"),
        ("12", TypeError, "counts: expected a 1-D sequence of integers, got str"),
        ({1: 2}, TypeError, "counts: expected a 1-D sequence of integers, got dict"),
    ],
)
def test_bad_counts(counts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        reuse_schedule(counts)


@pytest.mark.parametrize(
    ("refresh_interval", "error"),
    [(0, ValueError), (-2, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)],
)
def test_bad_refresh_interval(refresh_interval: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"refresh_interval: expected an int.*, got"):
        reuse_schedule([1], refresh_interval)  # type: ignore[arg-type]


def test_more_passes_than_a_list_should_hold() -> None:
    assert len(reuse_schedule([2**21], 2)) == 2**20
    with pytest.raises(ValueError, match="counts: expected at most 1048576 passes, got 1048577"):
        reuse_schedule([2**21, 1], 2)
    with pytest.raises(ValueError, match="counts: expected at most"):
        reuse_schedule([2**62], 2)
