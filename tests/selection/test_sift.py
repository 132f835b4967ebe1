# SPDX-License-Identifier: Apache-2.0
"""SIFT: the oracle's choices in float64, certified below; repeats, caps, stopping, many vectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import hullkit
import numpy as np
import pytest
import torch
from _cases import FAMILIES, LOW_PRECISION, TIED, Spec, batch, clustered, fixed, specs
from _certificates import EPS, gains_after, variance_after
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Options(NamedTuple):
    total: int
    noise: float
    alpha: float | None
    max_multiplicity: int | None
    vectors: int  # of the prompt; 0: a query (d,)


@st.composite
def options(draw: st.DrawFn, n: int) -> Options:
    total = draw(st.sampled_from((1, 2, 7, 20, 50, 151)))
    least = -(-total // n)
    return Options(
        total,
        draw(st.sampled_from((0.01, 0.01, 0.2, 1e-3, 3.0))),
        draw(st.sampled_from((None, None, 0.02, 0.2, 1.0))),
        draw(st.sampled_from((None, None, least, max(2, least)))),
        draw(st.sampled_from((0, 0, 1, 3))),
    )


def with_vectors(query: Array, vectors: int) -> Array:
    """The query and others around it."""
    noise = np.random.default_rng(vectors).standard_normal((vectors, len(query)))
    return query if vectors == 0 else query + 0.3 * np.abs(query).max() * noise


def kernel_choice(pool: Array, query: Array, chosen: Options) -> hullkit.SIFTResult:
    vectors = torch.from_numpy(query)
    result = hullkit.sift(
        torch.from_numpy(pool),
        vectors if vectors.ndim == 1 else vectors[None],
        chosen.total,
        noise=chosen.noise,
        alpha=chosen.alpha,
        max_multiplicity=chosen.max_multiplicity,
    )
    return result if vectors.ndim == 1 else hullkit.SIFTResult(*(field[0] for field in result))


def assert_is_what_order_says(result: hullkit.SIFTResult, total: int) -> int:
    """Every field against the order of choice; returns the steps taken."""
    steps = int(result.num_steps)
    order = result.order[:steps].tolist()
    assert result.order.shape == result.variance.shape == (total,)
    assert (result.order[steps:] == -1).all()
    assert (result.variance[steps:] == result.variance[steps - 1]).all()
    distinct = list(dict.fromkeys(order))
    assert result.indices[: len(distinct)].tolist() == distinct
    assert result.counts[: len(distinct)].tolist() == [order.count(i) for i in distinct]
    assert (result.indices[len(distinct) :] == -1).all()
    assert (result.counts[len(distinct) :] == 0).all()
    return steps


@given(specs(st.sampled_from(sorted(FAMILIES)), scales=(1.0, 0.1, 30.0)), st.data())
@fixed(500)
def test_exact(spec: Spec, data: st.DataObject) -> None:
    pool, query = spec.build()
    chosen = data.draw(options(spec.n))
    query = with_vectors(query, chosen.vectors)
    result = kernel_choice(pool, query, chosen)
    oracle = reference.sift(pool, query, *chosen[:4])
    steps = assert_is_what_order_says(result, chosen.total)
    scale = float((np.atleast_2d(query) ** 2).sum())
    order, variance = result.order[:steps].numpy(), result.variance[:steps].numpy()
    if np.array_equal(order, oracle.order):
        assert np.abs(variance - oracle.variance).max() <= 1e-12 * scale
        return
    assert spec.family in TIED
    apart = np.flatnonzero(order[: len(oracle.order)] != oracle.order[: len(order)])[0]
    gains = gains_after(pool, query, order[:apart], chosen.noise)
    tie = abs(gains[order[apart]] - gains[oracle.order[apart]])
    assert tie <= 1e3 * EPS * scale, f"step {apart}: {tie} is no tie"


@pytest.mark.parametrize("vectors", [0, 3])
@pytest.mark.parametrize("noise", [1e-3, 0.2, 5.0])
def test_variance_is_the_posterior_of_the_multiset(noise: float, vectors: int) -> None:
    rng = np.random.default_rng(0)
    pool, query = clustered(rng, 40, 30)
    query = with_vectors(query, vectors)
    result = kernel_choice(pool, query, Options(60, noise, None, None, vectors))
    assert result.counts.max() > 1, "repeats are part of this test"
    for step in (1, 2, 9, 30, 60):
        expected = variance_after(pool, query, result.order[:step].numpy(), noise)
        assert float(result.variance[step - 1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 9, 30])
def test_many_more_steps_than_candidates(n: int) -> None:
    """The kernel is written down and subtracted from several times on the way."""
    pool, query = clustered(np.random.default_rng(n), n, 24)
    chosen = Options(400, 0.5, None, None, 0)
    result = kernel_choice(pool, query, chosen)
    oracle = reference.sift(pool, query, *chosen[:4])
    np.testing.assert_array_equal(result.order, oracle.order)
    np.testing.assert_allclose(result.variance, oracle.variance, rtol=0, atol=1e-12)


def test_one_direction_over_and_over() -> None:
    """An observation more of one row: the variance is noise / (noise + t) after t of them."""
    row = torch.zeros(1, 5, dtype=torch.float64)
    row[0, 2] = 1.0
    result = hullkit.sift(row, row[0], 9, noise=0.5)
    assert result.order.tolist() == [0] * 9
    assert result.counts.tolist() == [9]
    expected = 0.5 / (0.5 + torch.arange(1, 10, dtype=torch.float64))
    torch.testing.assert_close(result.variance, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    row = torch.from_numpy(np.random.default_rng(0).standard_normal(129)).to(dtype)
    other = torch.from_numpy(np.random.default_rng(1).standard_normal(129)).to(dtype)
    for n in (1, 2, 7, 8, 9, 63, 151):
        copies = row.expand(n, -1)
        assert hullkit.sift(copies, row, 9).order.tolist() == [0] * 9
        capped = hullkit.sift(copies, row, n, max_multiplicity=1)
        assert capped.order.tolist() == list(range(n))
        pairs = torch.stack([row, other]).repeat(n, 1)  # row, other, row, other, ...
        result = hullkit.sift(pairs, row + other, 2 * n, max_multiplicity=1)
        for copies_of_one in (result.order[result.order % 2 == r] for r in (0, 1)):
            assert copies_of_one.tolist() == sorted(copies_of_one.tolist())


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_certified(dtype: torch.dtype) -> None:
    """Each choice's gain is the best one, but for 1e-5 of the query's variance."""

    @fixed(60)
    @given(specs(st.sampled_from(("clustered", "gaussian", "duplicates", "query_at_vertex"))))
    def check(spec: Spec) -> None:
        pool, query = spec._replace(scale=1.0).tensors(dtype)
        result = hullkit.sift(pool, query, 20)
        steps = assert_is_what_order_says(result, 20)
        assert steps == 20
        rows, target = pool.double().numpy(), query.double().numpy()
        scale = float(target @ target)
        order = result.order.numpy()
        for step in (0, 1, 5, 19):
            gains = gains_after(rows, target, order[:step], 0.01)
            assert gains.max() - gains[order[step]] <= 1e-5 * scale
        expected = variance_after(rows, target, order, 0.01)
        assert abs(float(result.variance[-1]) - expected) <= 1e-5 * scale

    check()


def test_variance_falls_and_gains_are_what_it_loses() -> None:
    pool, query = batch(torch.float64)
    result = hullkit.sift(pool, query, 30, noise=0.2)
    before = torch.cat([query.square().sum(1, keepdim=True), result.variance[:, :-1]], 1)
    assert (result.variance < before).all()
    for b in range(len(pool)):
        for step in (0, 3, 20):
            order = result.order[b, :step].tolist()
            gains = gains_after(pool[b].numpy(), query[b].numpy(), order, 0.2)
            lost = float(before[b, step] - result.variance[b, step])
            assert lost == pytest.approx(float(gains.max()), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 1.0, 100.0])
def test_stops_where_alpha_says(alpha: float) -> None:
    """After step t, if what is uncertain still is more than 1 / (alpha t)."""
    pool, query = batch(torch.float64)
    whole = hullkit.sift(pool, query, 50, noise=0.2)
    stopped = hullkit.sift(pool, query, 50, noise=0.2, alpha=alpha)
    for b in range(len(pool)):
        steps = next(
            (t for t in range(1, 51) if math.sqrt(whole.variance[b, t - 1]) > 1.0 / (alpha * t)), 50
        )
        assert int(stopped.num_steps[b]) == steps
        assert_is_what_order_says(hullkit.SIFTResult(*(field[b] for field in stopped)), 50)
        assert torch.equal(stopped.order[b, :steps], whole.order[b, :steps])
        assert torch.equal(stopped.variance[b, :steps], whole.variance[b, :steps])
    if alpha in (0.1, 0.3):
        assert 1 < int(stopped.num_steps.min()) < 50


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_counts_stay_below_the_cap(cap: int) -> None:
    pool, query = batch(torch.float64, n=17)
    result = hullkit.sift(pool, query, 17, noise=3.0, max_multiplicity=cap)
    free = hullkit.sift(pool, query, 17, noise=3.0)
    assert (free.counts.max(1).values >= 3).all()
    assert (result.counts.max(1).values == cap).all()
    assert (result.counts.sum(1) == 17).all()
    full = hullkit.sift(pool, query, 17 * cap, noise=3.0, max_multiplicity=cap)
    assert (full.counts == cap).all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_caps_that_cannot_be_met(backend: str | None) -> None:
    pool, query = batch(torch.float32, b=3, n=9)
    with pytest.raises(ValueError, match=r"max_multiplicity: .* total / 9 .* total = 19 .* got 2"):
        hullkit.sift(pool, query, 19, max_multiplicity=2, backend=backend)
    lengths = torch.tensor([9, 4, 9])
    with pytest.raises(ValueError, match=r"max_multiplicity: .* total / 4 .* total = 9 .* got 2"):
        hullkit.sift(pool, query, 9, max_multiplicity=2, lengths=lengths, backend=backend)
    assert (
        hullkit.sift(pool, query, 8, max_multiplicity=2, lengths=lengths, backend=backend)
        .counts.sum(1)
        .tolist()
        == [8] * 3
    )


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
def test_vectors_of_a_prompt(dtype: torch.dtype) -> None:
    """One vector is a query; a vector of zeros, or their order, counts for nothing; pools may be
    shared, and a prompt is the same alone and in any batch."""
    pool, query = batch(dtype, b=4)
    one = hullkit.sift(pool, query, 12)
    _assert_equal(hullkit.sift(pool, query[:, None], 12), one)
    padded = torch.stack([query, torch.zeros_like(query)], 1)
    _assert_equal(hullkit.sift(pool, padded, 12), one)
    several = torch.stack([query, query.roll(1, 0), query.roll(2, 0)], 1)
    result = hullkit.sift(pool, several, 12)
    assert not torch.equal(result.order, one.order)
    for b in range(4):
        alone = hullkit.sift(pool[b], several[b : b + 1], 12)
        _assert_equal(alone, hullkit.SIFTResult(*(field[b : b + 1] for field in result)))
        spread = torch.stack([several, several + 1], -1)[..., 0]  # coordinates two apart
        _assert_equal(hullkit.sift(pool, spread, 12), result)
    shared = hullkit.sift(pool[0], several, 12)
    _assert_equal(hullkit.sift(pool[0].expand(4, -1, -1), several, 12), shared)
    candidates = torch.arange(63).flip(0).expand(4, -1)
    flipped = hullkit.sift(pool[0], several, 12, candidates=candidates)
    assert torch.equal(62 - flipped.order, shared.order)


def _assert_equal(one: hullkit.SIFTResult, other: hullkit.SIFTResult) -> None:
    for field, left, right in zip(one._fields, one, other, strict=True):
        assert torch.equal(left, right), field


@pytest.mark.parametrize("vectors", [1, 3])
def test_reference_backend(vectors: int) -> None:
    pool, query = batch(torch.float64, b=3, n=20)
    several = torch.stack([query] + [query.roll(k, 0) for k in range(1, vectors)], 1)
    problems: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = [
        (pool, several, {"lengths": torch.tensor([20, 3, 11])}),
        (pool[0], several, {"candidates": torch.randint(-1, 20, (3, 15))}),
        (pool[0], query[0], {"candidates": torch.tensor([3, -1, 9, 9])}),
        (pool[0], query[:0], {}),
    ]
    for rows, vector, rest in problems:
        for own in ({}, {"alpha": 0.3, "noise": 0.2}, {"max_multiplicity": 7}):
            kernel = hullkit.sift(rows, vector, 11, **rest, **own)
            oracle = hullkit.sift(rows, vector, 11, **rest, **own, backend="reference")
            for field, left, right in zip(kernel._fields, kernel, oracle, strict=True):
                assert left.dtype == right.dtype
                if left.dtype == torch.int64:
                    assert torch.equal(left, right), field
                else:
                    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_bad_options() -> None:
    pool, query = batch(torch.float32, b=3, n=9, d=17)
    for name, value, error, message in (
        ("noise", 0.0, ValueError, "finite number > 0, got 0.0"),
        ("noise", -1.0, ValueError, "got -1.0"),
        ("noise", math.nan, ValueError, "got nan"),
        ("noise", math.inf, ValueError, "finite number > 0, got inf"),
        ("noise", "small", TypeError, "number, got str"),
        ("alpha", 0.0, ValueError, "finite number > 0, got 0.0"),
        ("alpha", True, TypeError, "number, got bool"),
        ("max_multiplicity", 0, ValueError, "int >= 1, got 0"),
        ("max_multiplicity", 1.5, TypeError, "int, got float"),
    ):
        with pytest.raises(error, match=rf"{name}.*{message}"):
            hullkit.sift(pool, query, 5, **{name: value})
    with pytest.raises(TypeError, match="unexpected keyword"):
        hullkit.sift(pool, query, 5, momentum=0.9)
    for shape in ((1, 1, 3, 17), (3, 0, 17), ()):
        with pytest.raises(ValueError, match=r"query: .*\(B, m, d\) with m >= 1, got"):
            hullkit.sift(pool, torch.zeros(shape), 5)
    with pytest.raises(ValueError, match=r"query: expected shape \(3, 17\)"):
        hullkit.sift(pool, torch.zeros(2, 4, 17), 5)
    with pytest.raises(ValueError, match=r"query: expected shape \(d,\) or \(B, d\), got"):
        hullkit.frank_wolfe(pool, query[:, None])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_operator_checks_its_options(device: str) -> None:
    """It takes them from anybody, and divides by some."""
    pool, query = (tensor.to(device) for tensor in batch(torch.float32, b=2, n=9, d=17))
    out = hullkit.sift(pool, query, 5)
    good = {"total": 5, "noise": 0.01, "alpha": 0.0, "max_multiplicity": 5}
    torch.ops.hullkit.sift(pool, query, None, None, *good.values(), *out)
    for name, value, message in (
        ("total", 0, "an int >= 1, got 0"),
        ("noise", 0.0, "a finite number > 0, got 0"),
        ("noise", -1.0, "a finite number > 0, got -1"),
        ("noise", math.nan, "a finite number > 0, got nan"),
        ("noise", math.inf, "a finite number > 0, got inf"),
        ("alpha", -0.5, "a finite number >= 0, got -0.5"),
        ("alpha", math.nan, "a finite number >= 0, got nan"),
        ("max_multiplicity", 0, "an int >= 1, got 0"),
        ("max_multiplicity", -3, "an int >= 1, got -3"),
    ):
        options = {**good, name: value}
        with pytest.raises(ValueError, match=f"{name}: expected {message}"):
            torch.ops.hullkit.sift(pool, query, None, None, *options.values(), *out)


def test_far_queries_say_so() -> None:
    pool, query = batch(torch.float64, b=2, n=9, d=17)
    with pytest.raises(ValueError, match=r"pool: .* overflow in entry 0"):
        hullkit.sift(pool * 1e10, query * 1e150, 3)
    with pytest.raises(ValueError, match=r"query: .* overflow in entry 0; scale the embeddings"):
        hullkit.sift(pool * 1e-90, query * 1e160, 3)


def test_gains_that_overflow_on_the_way_say_so() -> None:
    """All gains are NaN after some steps: none is the largest."""
    pool = torch.tensor([[1e150], [3.0], [1e140]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"noise: expected gains .* overflow in entry 0, step \d+"):
        hullkit.sift(pool, torch.tensor([1.0], dtype=torch.float64), 12, noise=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_variances_are_right_where_rows_nearly_depend_on_one_another(dtype: torch.dtype) -> None:
    """The noise is as small as the rounding of products in float32."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 5, generator=generator) @ torch.randn(5, 30, generator=generator)
    pool, query = flat.to(dtype), torch.randn(30, generator=generator).to(dtype)
    result = hullkit.sift(pool, query, 30, noise=2e-4)
    rows, wide = pool[result.order].double(), query.double()
    products = rows @ wide
    kernel = rows @ rows.T + 2e-4 * torch.eye(30, dtype=torch.float64)
    expected = wide @ wide - products @ torch.linalg.solve(kernel, products)
    assert abs(result.variance[-1] - expected) <= 1e-9 * (wide @ wide)
