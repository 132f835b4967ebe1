# SPDX-License-Identifier: Apache-2.0
"""Against activeft itself: its Retriever over faiss, its choices where rounding does not decide."""

from __future__ import annotations

import math
from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import unit
from _certificates import gains_after
from hullkit.interop.activeft import Retriever
from numpy.typing import NDArray

faiss = pytest.importorskip("faiss", reason="faiss is not installed")
activeft = pytest.importorskip("activeft", reason="activeft is not installed")

from activeft.acquisition_functions.lazy_vtl import LazyVTL  # noqa: E402
from activeft.acquisition_functions.vtl import VTL  # noqa: E402
from activeft.sift import Retriever as Theirs  # noqa: E402

# activeft turns tensors into arrays by a way that NumPy has since deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

CORPUS, DIM = 20_000, 96
Answer = tuple[NDArray[Any], NDArray[Any], NDArray[Any], Any]


@pytest.fixture(scope="module")
def corpus() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, DIM))
    rows = centres[rng.integers(100, size=CORPUS)] + 0.8 * rng.standard_normal((CORPUS, DIM))
    return unit(rows).astype(np.float32)


@pytest.fixture(scope="module")
def index(corpus: NDArray[np.float32]) -> Any:
    index = faiss.IndexFlatIP(DIM)
    index.add(corpus)
    return index


def queries(count: int, vectors: int = 1, seed: int = 1) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    rows = np.random.default_rng(0).standard_normal((100, DIM))[rng.integers(100, size=count)]
    noise = rng.standard_normal((count, vectors, DIM))
    return unit(rows[:, None] + 0.8 * noise).astype(np.float32)


def theirs(index: Any, llambda: float = 0.01, **options: Any) -> Theirs:
    """Their retriever; its choice without the process that loads the data, which takes longer."""
    rule = VTL(target=torch.Tensor(), num_workers=0, noise_std=math.sqrt(llambda))
    return Theirs(index, acquisition_function=rule, device=torch.device("cpu"), **options)


def assert_same_choice(
    ours: Answer, others: Answer, corpus: NDArray[np.float32], query: Any, llambda: float
) -> bool:
    """Equal (True), or parted where two gains are within float32's rounding of one another."""
    for one, other in zip(ours[:3], others[:3], strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
    np.testing.assert_array_equal(ours[2], corpus[ours[1]])
    apart = np.flatnonzero(ours[1] != others[1])
    same = int(apart[0]) if len(apart) else len(ours[1])
    variance = float((query.astype(np.float64) ** 2).sum())
    assert np.abs(ours[0][:same] - others[0][:same]).max(initial=0.0) <= 1e-5 * variance
    if same == len(ours[1]):
        return True
    rows = corpus[np.unique([*ours[1], *others[1]])].astype(np.float64)
    place = np.searchsorted(np.unique([*ours[1], *others[1]]), ours[1])
    other = np.searchsorted(np.unique([*ours[1], *others[1]]), others[1])
    gains = gains_after(rows, query.astype(np.float64), place[:same], llambda)
    assert abs(gains[place[same]] - gains[other[same]]) <= 1e-5 * variance
    return False


@pytest.mark.parametrize(
    ("count", "N", "vectors", "llambda", "options"),
    [
        (10, 50, 1, 0.01, {}),
        (4, 20, 1, 1.0, {"also_query_opposite": False}),
        (4, 20, 3, 0.1, {}),
    ],
)
def test_choices(
    index: Any,
    corpus: NDArray[np.float32],
    count: int,
    N: int,
    vectors: int,
    llambda: float,
    options: dict[str, Any],
) -> None:
    prompts = queries(count, vectors)
    retriever = Retriever(index, llambda=llambda, device="cpu", **options)
    *batch, seconds = retriever.batch_search(prompts, N, 200)
    assert 0 < seconds.faiss < 60
    assert 0 < seconds.sift < 60
    equal = 0
    their_retriever = theirs(index, llambda, **options)
    for b, prompt in enumerate(prompts):
        ours = (*(part[b] for part in batch), seconds)
        others = their_retriever.search(prompt, N, 200)
        equal += assert_same_choice(ours, others, corpus, prompt, llambda)
        for pooling in (False, True) if b == 0 else ():
            alone = retriever.search(prompt, N, 200, mean_pooling=pooling)
            others = their_retriever.search(prompt, N, 200, mean_pooling=pooling)
            target = prompt.mean(0, keepdims=True) if pooling else prompt
            assert_same_choice(alone, others, corpus, target, llambda)
    assert equal >= 0.9 * count


def test_only_faiss_is_theirs(index: Any) -> None:
    prompts = queries(5, 2)
    for options in ({}, {"also_query_opposite": False}):
        ours = Retriever(index, only_faiss=True, **options).batch_search(prompts, 7, 30)
        others = theirs(index, only_faiss=True, **options).batch_search(prompts, 7, 30)
        for one, other in zip(ours[:3], others[:3], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        assert ours[3]._fields == others[3]._fields
        assert ours[3].sift == others[3].sift == 0


def test_more_candidates_than_the_index_has() -> None:
    """faiss pads with the id -1 and -3e38, of which the absolute value would be the nearest."""
    rows = queries(10, seed=3)[:, 0]
    index, query = faiss.IndexFlatIP(DIM), queries(1, seed=2)[0]
    index.add(rows)
    for options in ({}, {"also_query_opposite": False}):
        retriever = Retriever(index, only_faiss=True, device="cpu", **options)
        found, whole = retriever.search(query, 12, 12), retriever.search(query, 10)
        np.testing.assert_array_equal(found[1], [*whole[1], -1, -1])
        np.testing.assert_array_equal(found[0][:10], whole[0])
        assert (found[0][10:] < -1e38).all()
        assert np.isnan(found[2][10:]).all()
        others = theirs(index, only_faiss=True, **options).search(query, 3, 12)
        np.testing.assert_array_equal(found[1][:3], others[1])


def test_far_candidates_are_found_by_the_opposite_query() -> None:
    """K of the whole index, and rows that point away from the query: they tell as much."""
    rng = np.random.default_rng(3)
    rows = unit(rng.standard_normal((40, 8))).astype(np.float32)
    index = faiss.IndexFlatIP(8)
    index.add(rows)
    query = -rows[:1] + np.float32(0.05)
    ours = Retriever(index, device="cpu").search(query, 6, 12)
    others = theirs(index).search(query, 6, 12)
    assert ours[1][0] == 0
    assert_same_choice(ours, others, rows, query, 0.01)
    near = Retriever(index, also_query_opposite=False, device="cpu").search(query, 6, 12)
    assert 0 not in near[1]
    whole = Retriever(index, also_query_opposite=False, device="cpu").search(query, 6)
    others = theirs(index, also_query_opposite=False).search(query, 6, None)
    assert_same_choice(whole, others, rows, query, 0.01)


def test_each_candidate_once() -> None:
    """Rows across the query have one product in both searches; none may push others out."""
    rng = np.random.default_rng(4)
    rows = unit(rng.standard_normal((60, 8))).astype(np.float32)
    rows[:30, 4:] = 0.0
    rows[30:, :4] = 0.0
    query = np.zeros((1, 8), dtype=np.float32)
    query[0, :4] = 0.5
    flat = faiss.IndexFlatIP(8)
    flat.add(rows)
    cells = faiss.IndexIVFFlat(faiss.IndexFlatIP(8), 8, 2, faiss.METRIC_INNER_PRODUCT)
    cells.train(rows)
    cells.add(rows)
    cells.nprobe = 2
    for index in (flat, cells):
        for k in (None, 60, 59, 50, 31):
            found = Retriever(index, only_faiss=True, device="cpu").search(query, 60, k)
            assert len(set(found[1].tolist())) == len(found[1]) == (k or 60)
            assert set(range(30)) <= set(found[1].tolist())
            np.testing.assert_allclose(
                found[0], np.abs(rows[found[1]] @ query[0]), rtol=0.0, atol=1e-6
            )
        whole = Retriever(index, device="cpu").search(query, 20)
        expected = hullkit.sift(torch.from_numpy(rows), torch.from_numpy(query[0]), 20)
        np.testing.assert_allclose(-whole[0], expected.variance.numpy(), rtol=0.0, atol=1e-5)


def test_ids_below_zero() -> None:
    """An index may hash its ids: of those below 0 only -1 means that nothing was found."""
    rows = queries(50, 1, seed=8)[:, 0]
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50)
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    index.add_with_ids(rows, ids)
    plain = faiss.IndexFlatIP(DIM)
    plain.add(rows)
    query = queries(1, 1, seed=9)[0]
    for opposite in (False, True):
        ours, others = (
            Retriever(own, also_query_opposite=opposite, device="cpu").search(query, 20, 40)
            for own in (index, plain)
        )
        np.testing.assert_array_equal(ours[1], ids[others[1]])
        np.testing.assert_array_equal(ours[2], others[2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_prompt_without_candidates(device: str) -> None:
    """A GPU marks its answer, which would name vectors of another prompt."""
    coarse = faiss.IndexFlatL2(DIM)
    index = faiss.IndexIVFFlat(coarse, DIM, 2)
    centres = np.eye(2, DIM, dtype=np.float32)
    index.train(np.repeat(centres, 50, axis=0))
    index.add(np.repeat(centres[:1], 20, axis=0))  # the other list is empty
    retriever = Retriever(index, also_query_opposite=False, device=device)
    with pytest.raises(ValueError, match=r"at least one candidate.* in entry 1"):
        retriever.batch_search(centres[:, None], 3, 5)


def test_other_indices() -> None:
    """Distances instead of products; and cells with fewer vectors than K, which faiss pads."""
    rows = queries(300, 1, seed=5)[:, 0]
    index = faiss.IndexFlatL2(DIM)
    index.add(rows)
    query = queries(1, 1, seed=6)[0]
    ours = Retriever(index, also_query_opposite=False, device="cpu").search(query, 10, 40)
    others = theirs(index, also_query_opposite=False).search(query, 10, 40)
    assert_same_choice(ours, others, rows, query, 0.01)
    with pytest.raises(ValueError, match=r"also_query_opposite: expected False .* got True"):
        Retriever(index).search(query, 10, 40)
    cells = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, 4, faiss.METRIC_INNER_PRODUCT)
    cells.train(rows)
    cells.add(rows)
    found = cells.search(query, 300)[1][0]
    assert (found == -1).any()
    for opposite in (False, True):
        retriever = Retriever(cells, also_query_opposite=opposite, device="cpu")
        chosen = retriever.search(query, 30, 300)
        assert (chosen[1] >= 0).all()
        np.testing.assert_array_equal(chosen[2], rows[chosen[1]])
    expected = hullkit.sift(
        torch.from_numpy(rows[found[found >= 0]]), torch.from_numpy(query[0]), 30
    )
    nearest = Retriever(cells, also_query_opposite=False, only_faiss=True).search(query, 300, 300)
    np.testing.assert_array_equal(nearest[1], found)
    assert np.isnan(nearest[2][found < 0]).all()
    near = Retriever(cells, also_query_opposite=False, device="cpu").search(query, 30, 300)
    np.testing.assert_array_equal(near[1], found[expected.order.numpy()])


def test_fast_returns_gains_of_the_exact_choices(index: Any) -> None:
    """Theirs are lazy: gains seen before serve as bounds, which they need not be."""
    prompt = queries(1, 1, seed=9)[0]
    values, *chosen = Retriever(index, fast=True, device="cpu").search(prompt, 12, 100)
    rule = LazyVTL(target=torch.Tensor(), num_workers=0, noise_std=0.1)
    others = Theirs(index, acquisition_function=rule, device=torch.device("cpu")).search(
        prompt, 12, 100
    )
    alike = int(np.argmin([*(chosen[0] == others[1]), False]))
    assert alike >= 5
    np.testing.assert_allclose(values[:alike], others[0][:alike], rtol=0, atol=1e-5)
    exact = Retriever(index, device="cpu").search(prompt, 12, 100)
    np.testing.assert_array_equal(chosen[0], exact[1])
    before = np.concatenate([[np.square(prompt).sum()], -exact[0][:-1]])
    np.testing.assert_allclose(values, before + exact[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5])
def test_stops_where_their_uncertainty_says(
    index: Any, corpus: NDArray[np.float32], alpha: float
) -> None:
    """The rule of the paper on activeft's own values: step t ends it if sqrt > 1 / (alpha t)."""
    prompt = queries(1, 1, seed=4)[0]
    values, _, _, _ = theirs(index, 0.1).search(prompt, 40, 150)
    steps = next((t for t in range(1, 41) if math.sqrt(-values[t - 1]) > 1.0 / (alpha * t)), 40)
    candidates = Retriever(index, only_faiss=True).search(prompt, 150, 150)[1]
    stopped = hullkit.sift(
        torch.from_numpy(corpus[candidates]),
        torch.from_numpy(prompt[0]),
        40,
        noise=0.1,
        alpha=alpha,
    )
    assert int(stopped.num_steps) == steps
    assert 1 < steps < 40


def test_what_it_does_not_take(index: Any) -> None:
    rule = VTL(target=torch.Tensor(), num_workers=0, noise_std=0.1)
    with pytest.raises(NotImplementedError, match=r"acquisition_function: expected None.* VTL"):
        Retriever(index, rule)  # type: ignore[arg-type]
    retriever = Retriever(index)
    for wrong in (np.zeros((3, DIM)), np.zeros((2, 1, DIM + 1))):
        with pytest.raises(ValueError, match=r"queries: expected shape \(B, m, 96\), got"):
            retriever.batch_search(wrong, 5, 20)
    for wrong in (np.zeros(DIM), np.zeros((2, DIM + 1)), np.zeros((1, 2, DIM))):
        with pytest.raises(ValueError, match=r"query: expected shape \(m, 96\), got"):
            retriever.search(wrong, 5, 20)
    prompt = queries(1)[0]
    for options, message in (
        ({"N": 0}, "N: expected an int >= 1, got 0"),
        ({"K": 0}, "K: expected an int >= 1, got 0"),
        ({"K": -1}, "K: expected an int >= 1, got -1"),
        ({"threads": 0}, "threads: expected an int >= 1, got 0"),
        ({"N": 1 << 41}, "N: expected an int in 1..1099511627776"),
    ):
        with pytest.raises(ValueError, match=message):
            retriever.search(prompt, **{"N": 5, "K": 20} | options)
    with pytest.raises(ValueError, match="index: expected at least one vector, got none"):
        Retriever(faiss.IndexFlatIP(DIM)).search(prompt, 5)
    with pytest.raises(TypeError, match=r"index: expected a faiss\.Index of floats, got str"):
        Retriever("corpus.index")
    with pytest.raises(ValueError, match="llambda: expected a finite number > 0, got 0"):
        Retriever(index, llambda=0.0, device="cpu").search(prompt, 5, 20)
    for number, words in ((np.nan, "at least one candidate"), (np.inf, "finite values, got")):
        broken, row = faiss.IndexFlatIP(DIM), prompt.copy()
        row[0, 0] *= number  # the product with the prompt is infinity: faiss finds it
        broken.add(row)
        with pytest.raises(ValueError, match=f"index: expected {words}"):
            Retriever(broken, device="cpu").search(prompt, 5, 1)
    with pytest.raises(ValueError, match="queries: expected finite numbers, got NaN"):
        Retriever(index, only_faiss=True).search(prompt * np.nan, 5)
    without = faiss.IndexIDMap(faiss.IndexFlatL2(DIM))
    without.add_with_ids(queries(70)[:, 0], np.arange(70))
    with pytest.raises(ValueError, match="index: expected one that can reconstruct its vectors"):
        Retriever(without, also_query_opposite=False).search(prompt, 5, 20)


def test_threads_of_faiss_are_as_before(index: Any) -> None:
    """Also after an error inside of the search."""
    before, prompt = faiss.omp_get_max_threads(), queries(1)[0]
    faiss.omp_set_num_threads(3)
    try:
        retriever = Retriever(index, device="cpu")
        chosen = retriever.search(prompt, np.int64(5), np.int32(20))
        assert faiss.omp_get_max_threads() == 3
        assert np.array_equal(chosen[1], retriever.search(prompt, 5, 20, threads=2)[1])
        distances = faiss.IndexFlatL2(DIM)
        distances.add(prompt)
        with pytest.raises(ValueError, match="also_query_opposite"):
            Retriever(distances).search(prompt, 1)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
