# SPDX-License-Identifier: Apache-2.0
"""hullkit in code of HullFT's shape: once as it is, once patched, the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from _hullft import PACKAGE, module
from hullkit import reference
from hullkit.interop import hullft

MODULES = ("selector", "fill", "finetune", "runner", "evaluation")


@pytest.fixture
def patched(package: Any) -> Iterator[Any]:
    hullft.patch(package)
    yield package
    hullft.unpatch()


def problem(seed: int, n: int = 60, d: int = 24, queries: int | None = None) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(6, d))
    pool = topics[rng.integers(6, size=n)] + 0.7 * rng.normal(size=(n, d))
    query = topics[0] + 0.5 * rng.normal(size=d if queries is None else (queries, d))
    return pool / np.linalg.norm(pool, axis=1, keepdims=True), query / np.linalg.norm(query)


FILLS = [None, "integerization", "pad_by_weights"]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_selections(package: Any, fill: str | None, dtype: Any) -> None:
    run = module("runner").run_selection
    cases = []
    for seed in range(12):
        pool, query = problem(seed, queries=3 if seed % 3 == 0 else None)
        pool, query = pool.astype(dtype), query.astype(dtype)
        pool.flags.writeable = False
        for n_select in (1, 2, 7, 50):
            options = [{}, {"max_iter": 250, "tol": 1e-5}, {"tol": 0.5}][seed % 3]
            cases.append((pool, query, n_select, fill, options))
    naive = [run(*case, **options) for *case, options in cases]
    hullft.patch(package)
    try:
        ours = [run(*case, **options) for *case, options in cases]
    finally:
        hullft.unpatch()
    for (indices, weights), (wanted, wanted_weights) in zip(ours, naive, strict=True):
        assert np.array_equal(indices, wanted)
        assert indices.dtype == np.int64
        assert weights.dtype == np.float64
        assert np.allclose(
            weights, wanted_weights, rtol=0, atol=1e-12 if dtype is np.float64 else 1e-5
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("knn", {}),
        ("knn", {"use_faiss": False}),
        ("sift", {}),
        ("sift", {"llambda": 0.2}),
        ("sift", {"llambda": 0.2, "fast": True}),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_baselines(package: Any, name: str, options: dict[str, Any], dtype: Any) -> None:
    """Rows of several lengths, so that products and cosines have other neighbours."""

    def answers() -> list[Any]:
        selector = module("selector").get_selector(name, **options)
        assert selector.name == name
        return [selector.select(*case) for case in cases]

    cases = []
    for seed in range(12):
        pool, query = problem(seed, queries=3 if seed % 3 == 0 else None)
        pool = pool * np.random.default_rng(seed).uniform(0.5, 2.0, (len(pool), 1))
        pool, query = pool.astype(dtype), query.astype(dtype)
        pool.flags.writeable = False
        cases += [(pool, query, n_select) for n_select in (1, 7, 50)]
    naive = answers()
    hullft.patch(package)
    try:
        ours = answers()
    finally:
        hullft.unpatch()
    repeats = 0
    for (indices, values), (wanted, wanted_values) in zip(ours, naive, strict=True):
        assert np.array_equal(indices, wanted)
        assert (indices.dtype, values.dtype) == (np.int64, np.float32)
        np.testing.assert_allclose(values, wanted_values, rtol=1e-5, atol=1e-5)
        repeats += len(indices) - len(set(indices.tolist()))
    assert (repeats > 0) == (name == "sift")


def test_baselines_by_their_imported_names(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that imported the classes gets ours, whose answers no oracle makes, and then its own."""
    pool, query = problem(2)
    run, classes = module("runner").run_baselines, ("KNNSelector", "SIFTSelector")
    originals = [getattr(module("runner"), name) for name in classes]
    naive = run(pool, query, 9)
    hullft.patch(package)
    try:
        with monkeypatch.context() as without:
            for name in ("knn", "sift"):
                without.delattr(f"hullkit.reference.{name}")
            ours = run(pool, query, 9)
    finally:
        hullft.unpatch()
    for name in ("knn", "sift"):
        assert np.array_equal(ours[name][0], naive[name][0])
    assert [getattr(module("runner"), name) for name in classes] == originals


def test_numbers_of_points_are_checked() -> None:
    pool, query = problem(0)
    for wrong in (0, len(pool) + 1):
        with pytest.raises(ValueError, match=rf"n_points: expected an int in 1..60, got {wrong}"):
            hullft.KNNSelector().select(pool, query, wrong)
    with pytest.raises(ValueError, match="n_points: expected an int >= 1, got 0"):
        hullft.SIFTSelector().select(pool, query, 0)
    with pytest.raises(ValueError, match="n_points: expected an int >= 0, got -1"):
        hullft.FWSelector().select(pool, query, -1)
    with pytest.raises(TypeError, match="n_points: expected an int, got float"):
        hullft.FWSelector().select(pool, query, 2.0)  # type: ignore[arg-type]
    assert [len(part) for part in hullft.FWSelector().select(pool, query, 0)] == [0, 0]
    assert len(hullft.FWSelector().select(pool, query, np.int64(2))[0]) == 2
    assert len(hullft.SIFTSelector().select(pool, query, len(pool) + 1)[0]) == len(pool) + 1


def test_a_row_of_zeros_has_no_direction() -> None:
    pool, query = problem(0)
    pool[4] = 0.0
    indices, values = hullft.KNNSelector(use_faiss=False).select(pool, query, len(pool))
    assert values[indices == 4] == 0.0


def test_kernels_answer(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No oracle is left behind the patched names."""
    for name in ("frank_wolfe", "round_multiplicities", "apportion"):
        monkeypatch.delattr(f"hullkit.reference.{name}")
    pool, query = problem(0)
    for fill in FILLS:
        module("runner").run_selection(pool, query, 9, fill)


def test_embeddings_of_other_types() -> None:
    pool, query = problem(3)
    selector = hullft.FWSelector(max_iter=50)
    assert selector.name == "fw"
    half, integer = pool.astype(np.float16), np.rint(100 * pool).astype(np.int32)
    for array, wide in ((half, half.astype(np.float32)), (integer, integer.astype(np.float64))):
        ours = selector.select(array, query, 9)
        wanted = selector.select(wide, query.astype(wide.dtype), 9)
        assert all(map(np.array_equal, ours, wanted))


def test_exchange_passes() -> None:
    """Over half of these change in the first pass, and some in the second."""
    passes = [-1, 0, 1, 2]
    found: dict[int, list[list[int]]] = {number: [] for number in passes}
    for seed in range(20):
        pool, query = problem(seed, n=12, d=8)
        weights = np.random.default_rng(seed).dirichlet(np.ones(12))
        for number in passes:
            ours, _ = hullft.integerize_by_geometry(np.arange(12), weights, pool, query, 30, number)
            counts = np.bincount(ours, minlength=12).tolist()
            wanted = reference.round_multiplicities(pool, query, weights, 30, max(0, number))
            assert counts == wanted.tolist()
            found[number].append(counts)
    assert found[-1] == found[0]
    assert sum(a != b for a, b in zip(found[0], found[1], strict=True)) > 10
    assert found[1] != found[2]


def test_filling_at_the_edges() -> None:
    indices, weights = np.array([4, 2, 9], dtype=np.int32), np.array([0.5, 0.3, 0.2])
    points = np.eye(3)
    for n_select in (0, -1):
        expanded = hullft.integerize_by_geometry(indices, weights, points, points[0], n_select)
        assert [len(part) for part in expanded] == [0, 0]
    empty = hullft.integerize_by_geometry(indices[:0], weights[:0], points[:0], points[0], 5)
    assert [len(part) for part in empty] == [0, 0]
    one, share = hullft.integerize_by_geometry([7], [0.4], points[:1], points[:1], 3)
    assert one.tolist() == [7, 7, 7]
    assert np.array_equal(share, np.full(3, 1 / 3))

    pad = hullft.pad_by_weights_deterministic
    cut, kept = pad(indices, weights, 2)
    assert (cut.tolist(), kept.tolist(), cut.dtype) == ([4, 2], [0.5, 0.3], np.int32)
    cut[0] = 0
    assert indices[0] == 4
    assert pad(indices, np.array([0.5, -0.5, 0.5]), 6)[0].tolist() == [4, 4, 4, 9, 9, 9]
    even = pad(indices, np.zeros(3), 6)
    assert even[0].tolist() == [4, 4, 2, 2, 9, 9]
    assert even[1].tolist() == [1 / 3] * 6
    padded, their_weights = pad(indices, 2 * weights, 10)
    assert padded.tolist() == [4] * 5 + [2] * 3 + [9] * 2
    assert np.allclose(their_weights, [0.5] * 5 + [0.3] * 3 + [0.2] * 2)
    assert [len(part) for part in pad(indices[:0], weights[:0], 5)] == [0, 0]
    assert [len(part) for part in pad(indices, weights, 0)] == [0, 0]
    with pytest.raises(ValueError, match="n_select: expected an int >= 0, got -1"):
        pad(indices, weights, -1)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="weights: expected finite numbers, got NaN"):
            pad(indices, np.array([0.5, bad, 0.5]), 6)
    with pytest.raises(ValueError, match=r"weights: expected one for each index, got shape \(2,\)"):
        pad(indices, weights[:2], 6)


def names_of(package: Any) -> dict[tuple[str, str], Any]:
    """Every binding in the package's modules, the entries of the registry among them."""
    found = {}
    for name in MODULES:
        for key, value in vars(module(name)).items():
            found[name, key] = value
            if key == "_SELECTORS":
                found |= {(key, entry): selector for entry, selector in value.items()}
    return found


def test_patching(package: Any) -> None:
    before = names_of(package)
    hullft.patch(package)
    after = names_of(package)
    changed = {place: after[place] for place in before if after[place] is not before[place]}
    hullft.unpatch()
    assert changed == {
        ("selector", "KNNSelector"): hullft.KNNSelector,
        ("_SELECTORS", "knn"): hullft.KNNSelector,
        ("runner", "KNNSelector"): hullft.KNNSelector,
        ("selector", "SIFTSelector"): hullft.SIFTSelector,
        ("_SELECTORS", "sift"): hullft.SIFTSelector,
        ("runner", "SIFTSelector"): hullft.SIFTSelector,
        ("selector", "FWSelector"): hullft.FWSelector,
        ("_SELECTORS", "fw"): hullft.FWSelector,
        ("fill", "integerize_by_geometry"): hullft.integerize_by_geometry,
        ("runner", "integerize_by_geometry"): hullft.integerize_by_geometry,
        ("fill", "pad_by_weights_deterministic"): hullft.pad_by_weights_deterministic,
        ("runner", "pad_by_weights_deterministic"): hullft.pad_by_weights_deterministic,
        ("finetune", "finetune_on_texts"): hullft.finetune_on_texts,
        ("evaluation", "finetune_on_texts"): hullft.finetune_on_texts,
        ("finetune", "finetune_with_approach"): hullft.finetune_with_approach,
        ("evaluation", "finetune_with_approach"): hullft.finetune_with_approach,
    }
    restored = names_of(package)
    assert restored.keys() == before.keys()
    assert all(restored[place] is before[place] for place in before)


def test_names_of_the_package_itself(package: Any) -> None:
    original = package.Chosen = module("selector").FWSelector
    hullft.patch(package)
    assert package.Chosen is hullft.FWSelector
    hullft.unpatch()
    assert package.Chosen is original


def test_modules_imported_while_patched(package: Any) -> None:
    hullft.patch(PACKAGE)
    assert module("runner").integerize_by_geometry is hullft.integerize_by_geometry
    hullft.unpatch()
    assert module("runner").integerize_by_geometry is module("fill").integerize_by_geometry
    assert module("fill").integerize_by_geometry is not hullft.integerize_by_geometry


def test_what_others_bound_stays(package: Any) -> None:
    """Bindings to ours from before, and bindings made over ours since."""
    module("evaluation").integerize_by_geometry = hullft.integerize_by_geometry
    runner = module("runner")
    hullft.patch(package)
    runner.pad_by_weights_deterministic = None
    hullft.unpatch()
    assert module("evaluation").integerize_by_geometry is hullft.integerize_by_geometry
    assert runner.pad_by_weights_deterministic is None


def test_patching_refusals(package: Any) -> None:
    with pytest.raises(RuntimeError, match="unpatch: expected a patched package, got none"):
        hullft.unpatch()
    module("evaluation")  # which imports the name
    del module("finetune").finetune_on_texts
    before = names_of(package)
    with pytest.raises(
        AttributeError, match=rf"package: expected {PACKAGE}\.finetune\.finetune_on_texts, got none"
    ):
        hullft.patch(package)
    assert all(names_of(package)[place] is before[place] for place in before)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        hullft.patch("no_such_package")


def test_a_registry_that_refuses_leaves_nothing_replaced(package: Any) -> None:
    class Registry(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise KeyError(f"{key} is registered already")

    module("evaluation").REGISTRY = Registry(knn=module("selector").KNNSelector)
    before = names_of(package)
    with pytest.raises(KeyError, match="registered already"):
        hullft.patch(package)
    assert all(names_of(package)[place] is before[place] for place in before)
    del module("evaluation").REGISTRY
    hullft.patch(package)
    hullft.unpatch()


def test_one_patch_at_a_time(patched: Any) -> None:
    with pytest.raises(
        RuntimeError, match=f"patch: expected no patched package, got {PACKAGE} patched"
    ):
        hullft.patch(patched)


def test_the_rows_that_indices_name_are_asked_for() -> None:
    pool = np.eye(5)
    indices, weights = np.array([1, 3]), np.array([0.5, 0.5])
    with pytest.raises(ValueError, match=r"support_embeddings: expected the 2 rows .* \(5, 5\)"):
        hullft.integerize_by_geometry(indices, weights, pool, pool[1], 4)
    with pytest.raises(ValueError, match=r"weights: expected one for each index, got shape \(1,\)"):
        hullft.integerize_by_geometry(indices, weights[:1], pool[indices], pool[1], 4)


def test_errors_name_the_callers_arguments() -> None:
    pool, query = np.eye(3), np.array([0.7, 0.3, 0.0])
    broken = pool.copy()
    broken[1, 1] = np.nan
    selectors = (hullft.KNNSelector(), hullft.SIFTSelector(), hullft.FWSelector())
    for selector in selectors:
        with pytest.raises(ValueError, match=r"^embeddings: expected finite values, got nan"):
            selector.select(broken, query, 2)
        with pytest.raises(ValueError, match=r"^query_embedding: expected d = 3"):
            selector.select(pool, query[:2], 2)
        with pytest.raises(TypeError, match=r"^embeddings: expected dtype .*complex128"):
            selector.select(1j * pool, query, 2)
        with pytest.raises(TypeError, match=r"^query_embedding: expected dtype .*complex128"):
            selector.select(pool, 1j * query, 2)
    with pytest.raises(ValueError, match=r"^llambda: expected a finite number > 0, got 0"):
        hullft.SIFTSelector(llambda=0).select(pool, query, 2)
    with pytest.raises(ValueError, match=r"^n_points: expected an int in 1"):
        hullft.SIFTSelector().select(pool, query, 1 << 41)
    with pytest.raises(ValueError, match=r"^max_iter: expected an int >= 0, got -1"):
        hullft.FWSelector(max_iter=-1).select(pool, query, 2)
    fill, given = hullft.integerize_by_geometry, (np.array([4, 7]), np.array([0.7, 0.3]))
    with pytest.raises(ValueError, match=r"^n_select: expected an int in 1"):
        fill(*given, pool[:2], query, 1 << 41)
    with pytest.raises(ValueError, match=r"^n_select: expected an int in 1"):
        hullft.pad_by_weights_deterministic(*given, 1 << 41)
    with pytest.raises(ValueError, match=r"^target: expected d = 3 coordinates"):
        fill(*given, pool[:2], query[:2], 10)
    with pytest.raises(ValueError, match=r"^support_embeddings: expected finite values"):
        fill(*given, broken[:2], query, 10)
    with pytest.raises(TypeError, match=r"^support_embeddings: expected dtype .*complex128"):
        fill(*given, 1j * pool[:2], query, 10)


def test_indices_are_integers() -> None:
    """A fraction would be cut off, and name another row."""
    weights, pool = np.array([0.7, 0.3]), np.eye(2)
    for wrong in (np.array([4.7, 7.2]), [4.0, 7.0], [True, False]):
        with pytest.raises(TypeError, match=r"indices: expected integers, got (float64|bool)"):
            hullft.integerize_by_geometry(wrong, weights, pool, pool[0], 10)  # type: ignore[arg-type]
    hashed = np.array([4, 2**63], np.uint64)  # a negative one, as int64
    with pytest.raises(ValueError, match=rf"indices: expected a value below 2\*\*63, got {2**63}"):
        hullft.integerize_by_geometry(hashed, weights, pool, pool[0], 10)


def test_weights_of_any_size() -> None:
    """Their sum may be beyond float64, and their quotients are what counts."""
    for unit in (1.0, 2.0**-1073, 1.0 / 3.0, 5e307):
        rows, weights = hullft.pad_by_weights_deterministic([4, 7], [3 * unit, unit], 4)  # type: ignore[arg-type]
        assert rows.tolist() == [4, 4, 4, 7]
        np.testing.assert_allclose(weights, [0.75] * 3 + [0.25], rtol=1e-15)


@pytest.mark.parametrize(
    ("length", "dtype"), [(1e-13, float), (1e-300, float), (1e300, float), (1e25, "f4")]
)
def test_cosines_of_rows_of_any_length(length: float, dtype: Any) -> None:
    pool, query = problem(0)
    selector = hullft.KNNSelector(use_faiss=False)
    wanted = selector.select(pool, query, 20)
    ours = selector.select((pool * length).astype(dtype), (query * length).astype(dtype), 20)
    assert np.array_equal(ours[0], wanted[0])
    np.testing.assert_allclose(ours[1], wanted[1], rtol=1e-5)
