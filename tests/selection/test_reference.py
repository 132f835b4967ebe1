# SPDX-License-Identifier: Apache-2.0
"""The oracles themselves, against answers worked out by hand in exact fractions."""

from __future__ import annotations

from fractions import Fraction as F
from typing import Any

import numpy as np
import pytest
from hullkit import reference


def _array(values: Any) -> Any:
    return np.array([[float(x) for x in row] for row in values])


def _dot(left: list[F], right: list[F]) -> F:
    return sum((a * b for a, b in zip(left, right, strict=True)), F(0))


def test_lmo_by_hand() -> None:
    pool = _array([(1, 0), (0, 2), (-1, -1), (0, 2)])
    assert reference.lmo(pool, np.array([1.0, -1.0])) == (1, -2.0)  # products 1, -2, 0, -2
    assert reference.lmo(pool, np.array([0.0, 1.0])) == (2, -1.0)
    assert reference.lmo(pool, np.zeros(2)) == (0, 0.0)


def test_knn_by_hand() -> None:
    pool = _array([(1, 0), (0, 2), (-1, -1), (0, 2), (3, 0)])
    indices, values = reference.knn(pool, np.array([1.0, 1.0]), 4)  # products 1, 2, -2, 2, 3
    assert indices.tolist() == [4, 1, 3, 0]
    assert values.tolist() == [3.0, 2.0, 2.0, 1.0]


def test_projection_on_a_segment() -> None:
    """q = (1, 1), a = (2, 0), b = (0, 1): t = <q - a, b - a> / |b - a|^2 = (2 + 1) / 5."""
    outcome = reference.frank_wolfe(_array([(2, 0), (0, 1)]), np.array([1.0, 1.0]), max_iters=1)
    assert outcome.indices.tolist() == [1, 0]
    np.testing.assert_allclose(outcome.weights, [3 / 5, 2 / 5], rtol=1e-15)
    # x = (4/5, 3/5), residual (1/5, 2/5), orthogonal to the segment: optimal, gap 0.
    assert outcome.residual_norm == pytest.approx(5**0.5 / 5, rel=1e-15)
    assert outcome.dual_gap == pytest.approx(0.0, abs=1e-15)
    assert (outcome.num_iters, outcome.status) == (1, "MAX_ITERS")


def test_two_steps_in_a_triangle() -> None:
    """(4, 0), (0, 3), (0, 0) and q = (2, 1), in exact fractions."""
    a, b, c, q = [F(4), F(0)], [F(0), F(3)], [F(0), F(0)], [F(2), F(1)]
    # Products with q: 8, 3, 0. Start at a; residual (-2, 1); scores -8, 3, 0: b.
    residual = [q[0] - a[0], q[1] - a[1]]
    assert [_dot(residual, v) for v in (a, b, c)] == [-8, 3, 0]
    direction = [b[0] - a[0], b[1] - a[1]]
    first = _dot(residual, direction) / _dot(direction, direction)
    assert first == F(11, 25)
    x = [a[0] + first * direction[0], a[1] + first * direction[1]]
    assert x == [F(56, 25), F(33, 25)]
    # Residual (-6/25, -8/25): scores -24/25, -24/25, 0: c.
    residual = [q[0] - x[0], q[1] - x[1]]
    assert [_dot(residual, v) for v in (a, b, c)] == [F(-24, 25), F(-24, 25), 0]
    direction = [-x[0], -x[1]]
    second = _dot(residual, direction) / _dot(direction, direction)
    assert second == F(600, 4225) == F(24, 169)
    weights = [(1 - second) * (1 - first), (1 - second) * first, second]
    assert sum(weights) == 1

    pool, query = _array([a, b, c]), np.array([2.0, 1.0])
    one = reference.frank_wolfe(pool, query, max_iters=1)
    assert one.indices.tolist() == [0, 1]
    np.testing.assert_allclose(one.weights, [14 / 25, 11 / 25], rtol=1e-15)
    assert one.residual_norm == pytest.approx(10 / 25, rel=1e-14)  # |(-6, -8)| / 25
    # Gap: best score 0 less <residual, x> = -(6*56 + 8*33)/625 = -600/625.
    assert one.dual_gap == pytest.approx(600 / 625, rel=1e-14)
    two = reference.frank_wolfe(pool, query, max_iters=2)
    assert two.indices.tolist() == [0, 1, 2]
    np.testing.assert_allclose(two.weights, [float(w) for w in weights], rtol=1e-14)
    full = reference.frank_wolfe(pool, query, max_support=3)
    assert (full.status, full.num_iters) == ("MAX_SUPPORT", 2)


@pytest.mark.parametrize(
    ("pool", "query", "step"),
    [
        # Products 13, 11: start (3, -1); residual (3, 6), direction (-2, 2): 6 / 8.
        ([(3, -1), (1, 1)], (6, 5), F(6, 8)),
        # Products 4, 3: start (4, 0); residual (-3, 3), direction (-4, 1): 15 / 17.
        ([(4, 0), (0, 1)], (1, 3), F(15, 17)),
        # Products -4, -5: start (4, 0); residual (-5, -5): <(-5, -5), (-4, 1)> / 17.
        ([(4, 0), (0, 1)], (-1, -5), F(15, 17)),
    ],
)
def test_one_step(pool: Any, query: Any, step: F) -> None:
    outcome = reference.frank_wolfe(_array(pool), np.array(query, dtype=float), max_iters=1)
    assert outcome.indices.tolist() == [1, 0]
    np.testing.assert_allclose(outcome.weights, [float(step), float(1 - step)], rtol=1e-15)


def test_step_is_clipped_at_the_vertex() -> None:
    """(4, 0), (1, 0) and q = (1/2, 0): start (4, 0), step 3.5 / 3 clipped to 1; there it stalls."""
    outcome = reference.frank_wolfe(_array([(4, 0), (1, 0)]), np.array([0.5, 0.0]))
    assert outcome.indices.tolist() == [1, 0]  # touched, though its weight is 0 again
    assert outcome.weights.tolist() == [1.0, 0.0]
    assert (outcome.status, outcome.num_iters) == ("STALLED", 1)
    assert (outcome.residual_norm, outcome.dual_gap) == (0.5, 0.0)


def test_stalled_at_the_first_vertex() -> None:
    outcome = reference.frank_wolfe(_array([(3, -1), (1, 1)]), np.array([0.0, 9.0]))
    assert outcome.indices.tolist() == [1]  # products -9, 9; scores -11, 7
    assert (outcome.status, outcome.num_iters, outcome.dual_gap) == ("STALLED", 0, 0.0)


def test_stopping_rules() -> None:
    pool = _array([(1, 0), (0, 1), (1, 0)])
    at_vertex = reference.frank_wolfe(pool, np.array([1.0, 0.0]))
    assert (at_vertex.indices.tolist(), at_vertex.status) == ([0], "CONVERGED")
    half = reference.frank_wolfe(pool, np.array([0.5, 0.5]))
    assert half.indices.tolist() == [0, 1]
    assert half.weights.tolist() == [0.5, 0.5]
    assert (half.status, half.num_iters) == ("CONVERGED", 1)
    one = reference.frank_wolfe(pool, np.array([0.2, 0.5]), max_support=1)
    assert (one.indices.tolist(), one.status, one.num_iters) == ([1], "MAX_SUPPORT", 0)
    none = reference.frank_wolfe(pool, np.array([0.2, 0.5]), max_iters=0)
    assert (none.status, none.num_iters) == ("MAX_ITERS", 0)


def test_hamiltons_method() -> None:
    """The textbook example: 100 000 votes, 10 seats; quotas 4.7, 1.6, 1.58, 1.2, 0.61, 0.31."""
    votes = np.array([47000, 16000, 15800, 12000, 6100, 3100], dtype=np.float64)
    assert reference.apportion(votes, 10).tolist() == [5, 2, 1, 1, 1, 0]
    quotas = [4.7, 1.6, 1.58, 1.2, 0.61, 0.31]
    np.testing.assert_allclose(reference.quotas(votes, 10), quotas, rtol=1e-14)


def test_alabama_paradox() -> None:
    """One seat more, and the third state loses one: what Hamilton's method is known for."""
    people = np.array([6.0, 6.0, 2.0])
    assert reference.apportion(people, 10).tolist() == [4, 4, 2]
    assert reference.apportion(people, 11).tolist() == [5, 5, 1]


def test_apportion_edges() -> None:
    assert reference.apportion(np.array([1.0]), 7).tolist() == [7]
    assert reference.apportion(np.array([1.0, 1.0, 1.0]), 2).tolist() == [1, 1, 0]  # ties
    assert reference.apportion(np.array([0.0, 0.0]), 3).tolist() == [2, 1]  # uniform
    assert reference.apportion(np.array([-5.0, 1.0]), 3).tolist() == [0, 3]  # negative as 0
    assert reference.apportion(np.array([0.5, 0.25, 0.25]), 4).tolist() == [2, 1, 1]


def test_rounding_by_hand() -> None:
    """On a line: s = 0, 1 and q = 0.4, N = 4: L = (q - c_1 / 4)^2 is least at c_1 = 2."""
    support, query = _array([(0,), (1,)]), np.array([0.4])
    # Floors of (2.4, 1.6) are (2, 1); one unit left: c_1 = 1 is 0.15 away, c_1 = 2 is 0.1 away.
    counts = reference.round_multiplicities(support, query, np.array([0.6, 0.4]), 4)
    assert counts.tolist() == [2, 2]
    # Weights far off: floors (4, 0); passes move units from 0 to 1 while that helps.
    assert reference.round_multiplicities(support, query, np.array([1.0, 0.0]), 4, 0).tolist() == [
        4,
        0,
    ]
    # Donor 0 gives one unit per receiver and pass, and there is one receiver.
    assert reference.round_multiplicities(support, query, np.array([1.0, 0.0]), 4, 1).tolist() == [
        3,
        1,
    ]
    assert reference.round_multiplicities(support, query, np.array([1.0, 0.0]), 4, 2).tolist() == [
        2,
        2,
    ]
    assert reference.round_multiplicities(support, query, np.array([1.0, 0.0]), 4, 9).tolist() == [
        2,
        2,
    ]


def test_a_donor_gives_no_more_than_it_has() -> None:
    """Two receivers want the donor's only unit: the published procedure goes to -1 here."""
    support = _array([(-3, -3), (1, 0), (0, 1)])
    counts = reference.round_multiplicities(
        support, np.array([1.0, 1.0]), np.array([1.0, 0.0, 0.0]), 1, 1
    )
    assert counts.tolist() == [0, 1, 0]


def test_a_row_gives_none_in_the_pass_that_brings_its_first_unit() -> None:
    support = _array([(2,), (1,), (0,)])
    for passes, expected in ((1, [0, 1, 0]), (2, [0, 0, 1])):
        counts = reference.round_multiplicities(
            support, np.zeros(1), np.array([1.0, 0.0, 0.0]), 1, passes
        )
        assert counts.tolist() == expected


def test_greedy_ties_go_to_the_lowest_index() -> None:
    support = _array([(1, 0), (-1, 0), (1, 0), (-1, 0)])
    counts = reference.round_multiplicities(support, np.zeros(2), np.full(4, 0.25), 2, 0)
    assert counts.tolist() == [1, 1, 0, 0]


def test_single_point_takes_all() -> None:
    for total in (1, 7, 50):
        counts = reference.round_multiplicities(
            _array([(1, 2)]), np.array([0.0, 0.0]), np.array([0.3]), total
        )
        assert counts.tolist() == [total]
