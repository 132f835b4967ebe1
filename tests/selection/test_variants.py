# SPDX-License-Identifier: Apache-2.0
"""Away, pairwise and fully corrective Frank-Wolfe, gap_tol, and weights with a cap."""

from __future__ import annotations

from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import (
    DTYPES,
    FAMILIES,
    GENERIC,
    LOW_PRECISION,
    Spec,
    batch,
    clustered,
    fixed,
    specs,
)
from _certificates import (
    EPS,
    assert_exact,
    assert_simplex,
    kernel_outcome,
    length_scale,
    oracle_outcome,
)
from _programs import capped_optimum, hull_optimum, scale_squared
from hullkit import Status, reference
from hypothesis import given
from hypothesis import strategies as st

VARIANTS = ("away", "pairwise", "fully_corrective")
CAPPED = ("vanilla", "pairwise", "fully_corrective")
EXAMPLES = 53  # for each of 19 families: 1,007 pools
CAPPED_EXAMPLES = 16  # 304


def _objective(outcome: Any) -> float:
    return float(outcome.residual_norm) ** 2 / 2


def _least_cap(draw: st.DrawFn, n: int) -> float:
    """1 / k or a little more, for some k <= n."""
    k = draw(st.integers(min(2, n), n))
    return min(1.0, draw(st.sampled_from((1.0, 1.0, 1.37))) / k)


@st.composite
def capped(draw: st.DrawFn, family: str, sizes: tuple[int, ...]) -> tuple[Spec, float]:
    return draw(specs(family, sizes=sizes, dims=(1, 2, 17, 63))), _least_cap(draw, max(sizes))


@pytest.mark.parametrize("family", FAMILIES)
def test_fully_corrective_reaches_the_optimum(family: str) -> None:
    """To 1e-9 of scipy's answer, in a third of the steps that vanilla spends on less."""
    ran = []

    @fixed(EXAMPLES)
    @given(specs(family, sizes=(1, 2, 3, 63, 129), dims=(1, 2, 17, 63, 129)))
    def check(spec: Spec) -> None:
        pool, query = spec.build()
        scale = scale_squared(pool, query)
        best = hull_optimum(pool, query)
        exact = kernel_outcome(pool, query, variant="fully_corrective", tol=0.0)
        assert exact.status == "STALLED"
        assert abs(_objective(exact) - best) <= 1e-9 * scale
        assert -1e-14 * scale <= exact.dual_gap <= 1e-9 * scale
        vanilla = kernel_outcome(pool, query, tol=0.0)
        third = kernel_outcome(pool, query, variant="fully_corrective", tol=0.0, max_iters=83)
        assert _objective(third) <= _objective(vanilla) + 1e-14 * scale
        ran.append(spec)

    check()
    assert len(ran) >= EXAMPLES


@pytest.mark.parametrize("variant", ["vanilla", *VARIANTS])
@pytest.mark.parametrize("max_iters", [0, 3, 40, 1000])
def test_gap_bounds_the_suboptimality(variant: str, max_iters: int) -> None:
    """Wherever a run ends, and the linearly convergent ones end near the optimum."""
    for family in FAMILIES:
        for seed in range(3):
            pool, query = FAMILIES[family](np.random.default_rng(seed), 63, 17)
            best, scale = hull_optimum(pool, query), scale_squared(pool, query)
            outcome = kernel_outcome(pool, query, variant=variant, max_iters=max_iters, tol=0.0)
            excess = _objective(outcome) - best
            assert -1e-14 * scale <= excess <= outcome.dual_gap + 1e-14 * scale
            if max_iters == 1000 and variant != "vanilla":
                assert excess <= 1e-5 * scale


# Norms that differ 1e4-fold make weights ill-conditioned: they are right to 1e-9 there.
@pytest.mark.parametrize("family", sorted(set(GENERIC) - {"mixed_norms"}))
@pytest.mark.parametrize("max_weight", [1.0, 0.21])
def test_fully_corrective_follows_the_oracle(family: str, max_weight: float) -> None:
    """Before the last digits, where rounding chooses among vertices that gain nothing."""
    for seed in range(6):
        pool, query = FAMILIES[family](np.random.default_rng(seed), 63, 63)
        options = {"variant": "fully_corrective", "max_weight": max_weight}
        scale = scale_squared(pool, query)
        for limit in ({"max_iters": 5}, {"max_support": 9}, {"gap_tol": 1e-3 * scale}):
            assert_exact(pool, query, **options, **limit)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["gaussian", "clustered", "query_inside", "mixed_norms"])
def test_first_steps_follow_the_oracle(variant: str, family: str) -> None:
    """An exact pairwise step makes the scores of its two vertices equal: from then on rounding may
    choose. Whatever it chooses ends within its gap."""
    for seed in range(8):
        pool, query = FAMILIES[family](np.random.default_rng(seed), 63, 63)
        for max_iters in (0, 1) if variant == "pairwise" else (0, 1, 2, 3):
            options = {"variant": variant, "max_iters": max_iters}
            assert_exact(pool, query, **options)
        kernel, oracle = (
            run(pool, query, variant=variant, max_iters=60)
            for run in (kernel_outcome, oracle_outcome)
        )
        slack = max(kernel.dual_gap, oracle.dual_gap) + 64 * EPS * length_scale(pool, query) ** 2
        assert abs(_objective(kernel) - _objective(oracle)) <= slack


@pytest.mark.parametrize("family", FAMILIES)
def test_capped_reaches_the_optimum(family: str) -> None:
    ran = []

    @fixed(CAPPED_EXAMPLES)
    @given(capped(family, sizes=(33,)))
    def check(problem: tuple[Spec, float]) -> None:
        spec, cap = problem
        pool, query = spec.build()
        scale = scale_squared(pool, query)
        best = capped_optimum(pool, query, cap)
        exact = kernel_outcome(
            pool, query, variant="fully_corrective", tol=0.0, max_weight=cap, max_iters=1000
        )
        assert exact.weights.max() <= cap
        assert exact.status == "STALLED"
        assert abs(_objective(exact) - best) <= 1e-8 * scale
        assert -1e-14 * scale <= exact.dual_gap <= 1e-9 * scale
        for variant in CAPPED:
            other = kernel_outcome(pool, query, variant=variant, tol=0.0, max_weight=cap)
            assert other.weights.max() <= cap
            excess = _objective(other) - best
            assert -1e-9 * scale <= excess <= other.dual_gap + 1e-9 * scale
            assert excess <= 2e-3 * scale  # after 250 steps
        ran.append(spec)

    check()
    assert len(ran) >= CAPPED_EXAMPLES


def test_no_cap_is_a_cap_of_one() -> None:
    pool, query = clustered(np.random.default_rng(0), 63, 129)
    for variant in CAPPED:
        one = kernel_outcome(pool, query, variant=variant)
        other = kernel_outcome(pool, query, variant=variant, max_weight=1.0)
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)


def test_the_least_cap_is_uniform() -> None:
    """1 / n leaves one point; also where n times it is less than 1 in floating point."""
    assert 49 * (1 / 49) < 1
    for n in (1, 2, 49):
        pool, query = clustered(np.random.default_rng(n), n, 17)
        for variant in CAPPED:
            outcome = kernel_outcome(pool, query, variant=variant, max_weight=1 / n)
            np.testing.assert_allclose(outcome.weights, 1 / n, rtol=1e-14)
            assert outcome.dual_gap == pytest.approx(0.0, abs=1e-14)


def test_capped_lmo_by_hand() -> None:
    """Scores 3, 5, 1, 5 with weights up to 0.4: 0.4, 0.4 on the fives, 0.2 on the three."""
    weights, best = reference.active_set.capped_vertex(np.array([3.0, 5.0, 1.0, 5.0]), 0.4)
    assert best.tolist() == [1, 3, 0]
    np.testing.assert_allclose(weights, [0.2, 0.4, 0.0, 0.4], rtol=1e-15)
    outcome = kernel_outcome(
        np.array([[3.0], [5.0], [1.0], [5.0]]), np.array([1e3]), max_weight=0.4, max_iters=0
    )
    assert outcome.indices.tolist() == [1, 3, 0]
    np.testing.assert_allclose(outcome.weights, [0.4, 0.4, 0.2], rtol=1e-15)
    # 4.6 is the best there is: the gap is 0 over the capped simplex, and would not be without cap.
    assert outcome.dual_gap == pytest.approx(0.0, abs=1e-10)


def test_wolfe_drops_vertices_by_hand() -> None:
    """(0, 2), (3, 0), (-2, 1) and q = 0: the projection is on the segment of the last two."""
    pool = np.array([[0.0, 2.0], [3.0, 0.0], [-2.0, 1.0]])
    outcome = kernel_outcome(pool, np.zeros(2), variant="fully_corrective")
    # t (3, 0) + (1 - t) (-2, 1): t = <(2, -1), (5, -1)> / 26 = 11 / 26; q is not inside.
    assert set(outcome.indices[:2]) == {1, 2}
    np.testing.assert_allclose(sorted(outcome.weights), [0, 11 / 26, 15 / 26], atol=1e-15)
    assert outcome.support_size == 3  # touched, the first of them with weight 0 now


@pytest.mark.parametrize("variant", ["vanilla", *VARIANTS])
def test_gap_tol(variant: str) -> None:
    pool, query = clustered(np.random.default_rng(3), 63, 64)
    loose = kernel_outcome(pool, query, variant=variant, gap_tol=1e-2)
    tight = kernel_outcome(pool, query, variant=variant, gap_tol=1e-3)
    assert loose.status == tight.status == "GAP_TOL"
    assert loose.dual_gap <= 1e-2
    assert tight.dual_gap <= 1e-3
    assert loose.num_iters < tight.num_iters
    before = kernel_outcome(pool, query, variant=variant, max_iters=tight.num_iters - 1)
    assert before.dual_gap > 1e-3
    assert_exact(pool, query, variant=variant, gap_tol=1e-2)
    off = kernel_outcome(pool, query, variant=variant, max_iters=20)
    also = kernel_outcome(pool, query, variant=variant, max_iters=20, gap_tol=0.0)
    np.testing.assert_array_equal(off.weights, also.weights)


@pytest.mark.parametrize("variant", ["vanilla", *VARIANTS])
@pytest.mark.parametrize("max_support", [None, 1, 2, 7])
@pytest.mark.parametrize("n", [1, 2, 63])
def test_width_and_touched(n: int, max_support: int | None, variant: str) -> None:
    pool, query = clustered(np.random.default_rng(n), n, 17)
    for cap in (1.0, 0.4):
        if cap * n < 1 or (cap < 1 and (variant == "away" or max_support in (1, 2))):
            continue
        k = 1 if cap == 1 else 3
        result = hullkit.frank_wolfe(
            torch.from_numpy(pool),
            torch.from_numpy(query),
            max_support=max_support,
            max_iters=4,
            variant=variant,
            max_weight=cap,
        )
        limit = n if max_support is None else min(n, max_support)
        touched = k + 4 * (k if variant == "vanilla" else 1)
        assert result.indices.shape == (min(limit, touched),)
        size = int(result.support_size)
        assert k <= size <= limit
        assert (result.indices[:size] >= 0).all()
        assert (result.indices[size:] == -1).all()
        assert_simplex(result.weights)
        if Status(int(result.status)) is Status.MAX_SUPPORT and cap == 1:
            assert size == max_support


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-8, 1e-10, 1e-14])
def test_near_copies_of_every_row(spread: float) -> None:
    """The factor's pivots vanish into rounding; the optimum is found all the same."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        distinct, query = clustered(rng, 30, 40)
        pool = np.repeat(distinct, 4, axis=0) + spread * rng.standard_normal((120, 40))
        for cap in (1.0, 0.11):
            outcome = kernel_outcome(
                pool, query, variant="fully_corrective", tol=0.0, max_weight=cap
            )
            assert outcome.dual_gap <= 1e-12
            assert outcome.status == "STALLED"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_resolve_to_the_first(dtype: torch.dtype, variant: str) -> None:
    """Equal rows have equal scores wherever they stand, at the ends of vectors too."""
    seed = 0
    for n in 10 * [63, 65, 70, 129]:
        rng = np.random.default_rng(seed := seed + 1)
        distinct, query = clustered(rng, n // 3, 64)
        choice = rng.integers(len(distinct), size=n)
        result = hullkit.frank_wolfe(
            torch.from_numpy(distinct[choice]).to(dtype),
            torch.from_numpy(query).to(dtype),
            variant=variant,
            max_iters=40,
        )
        for index in result.indices[: int(result.support_size)].tolist():
            assert index == int(np.flatnonzero(choice == choice[index])[0])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("max_weight", [1.0, 0.04])
def test_lower_precision_certifies_itself(dtype: torch.dtype, max_weight: float) -> None:
    pool, query = batch(dtype, b=8, n=151, d=384)
    exact = hullkit.frank_wolfe(
        pool.double(), query.double(), variant="fully_corrective", max_weight=max_weight
    )
    for variant in ("pairwise", "fully_corrective"):
        result = hullkit.frank_wolfe(pool, query, variant=variant, max_weight=max_weight)
        assert_simplex(result.weights)
        assert (result.weights <= max_weight).all()
        assert (result.dual_gap <= 1e-6).all()
        torch.testing.assert_close(result.residual_norm, exact.residual_norm, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_batch_ragged_or_shared(dtype: torch.dtype) -> None:
    pool, query = batch(dtype, b=5)
    lengths = torch.tensor([63, 9, 17, 40, 62])
    candidates = torch.stack([torch.randperm(63) for _ in range(5)])
    candidates[:, 50:] = -1
    for variant in ("vanilla", *VARIANTS):
        for cap in (1.0, 0.2):
            if cap < 1 and variant == "away":
                continue
            options: dict[str, Any] = {"variant": variant, "max_weight": cap, "max_support": 9}
            torch.set_num_threads(2)
            ragged = hullkit.frank_wolfe(pool, query, lengths=lengths, **options)
            shared = hullkit.frank_wolfe(pool[0], query, candidates=candidates, **options)
            torch.set_num_threads(1)
            for b in range(5):
                alone = hullkit.frank_wolfe(pool[b, : lengths[b]], query[b], **options)
                one = hullkit.frank_wolfe(pool[0, candidates[b, :50]], query[b], **options)
                for field in ragged._fields:
                    assert torch.equal(getattr(ragged, field)[b], getattr(alone, field)), field
                    assert torch.equal(getattr(shared, field)[b], getattr(one, field)), field
                assert not ragged.weights.isnan().any()


def test_too_few_candidates_for_the_cap() -> None:
    pool, query = batch(torch.float32, b=3, n=9, d=5)
    with pytest.raises(ValueError, match=r"max_weight: expected at least 1 / 9 .* got 0.1"):
        hullkit.frank_wolfe(pool, query, max_weight=0.1)
    for backend in (None, "reference"):
        with pytest.raises(
            ValueError, match=r"max_weight: .* 1 / 4 for the 4 candidates of entry 1"
        ):
            hullkit.frank_wolfe(
                pool, query, max_weight=0.2, lengths=torch.tensor([9, 4, 5]), backend=backend
            )
