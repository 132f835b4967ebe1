# SPDX-License-Identifier: Apache-2.0
"""Selection from faiss indices of every kind, with embeddings that may stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hullkit
import numpy as np
import pytest
import torch

faiss = pytest.importorskip("faiss", reason="an extra is not installed")

from hullkit.interop.faiss import search, select  # noqa: E402

M, D, N = 600, 16, 24


@pytest.fixture(scope="module")
def corpus() -> Any:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(M, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def queries(count: int) -> Any:
    return np.random.default_rng(1).normal(size=(count, D)).astype(np.float32)


def filled(kind: str, corpus: Any) -> Any:
    index = faiss.index_factory(D, kind)
    index.train(corpus)
    index.add(corpus)
    return index


def same(chosen: hullkit.selection.Multiset, other: hullkit.selection.Multiset) -> bool:
    return torch.equal(chosen.rows, other.rows) and torch.equal(chosen.counts, other.counts)


@pytest.mark.parametrize("kind", ["Flat", "IVF40,Flat", "HNSW16", "IVF8,SQ8"])
@pytest.mark.parametrize("method", ["hull", "knn", "sift"])
def test_any_index_gives_the_selection_of_its_candidates(
    kind: str, method: str, corpus: Any
) -> None:
    index, prompts = filled(kind, corpus), queries(5)
    stored = index.search_and_reconstruct(prompts, N)[2]  # quantized ones are approximate
    ids = index.search(prompts, N)[1]
    chosen = select(index, prompts, 5, num_candidates=N, method=method)
    lengths = torch.from_numpy((ids >= 0).sum(1))
    assert bool((lengths < N).any()) == (kind == "IVF40,Flat")  # short lists
    pools, asked = torch.from_numpy(stored), torch.from_numpy(prompts)
    wanted = hullkit.select(pools, asked, 5, method=method, lengths=lengths)
    assert torch.equal(chosen.indices, wanted.indices)
    assert torch.equal(chosen.counts, wanted.counts)
    used = chosen.counts > 0
    looked_up = torch.from_numpy(ids).gather(1, chosen.indices.clamp_min(0))
    assert torch.equal(chosen.rows[used], looked_up[used])
    alone = select(index, prompts[2], 5, num_candidates=N, method=method)
    assert alone.rows.ndim == 1
    assert torch.equal(alone.rows, chosen.rows[2])


def test_a_corpus_on_disk(tmp_path: Path, corpus: Any) -> None:
    """An index and embeddings that are mapped: the same answer as in memory."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    index, prompts = filled("IVF8,Flat", corpus), queries(4)
    wanted = select(index, prompts, 10, num_candidates=N)
    faiss.write_index(index, str(tmp_path / "index"))
    np.save(tmp_path / "vectors.npy", corpus)
    save_file({"vectors": corpus}, tmp_path / "vectors.safetensors")
    mapped = faiss.read_index(str(tmp_path / "index"), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    assert same(select(mapped, prompts, 10, num_candidates=N), wanted)
    array = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert same(select(mapped, prompts, 10, num_candidates=N, embeddings=array), wanted)
    with safe_open(tmp_path / "vectors.safetensors", "pt") as file:
        tensor = file.get_tensor("vectors")
        assert same(select(mapped, prompts, 10, num_candidates=N, embeddings=tensor), wanted)
    _, pool, rows = search(mapped, prompts, N, embeddings=array)
    assert pool.data_ptr() == array.ctypes.data  # in place
    assert int(rows.max()) < M


def test_embeddings_by_columns(tmp_path: Path, corpus: Any, monkeypatch: Any) -> None:
    """Only the candidates' rows of a file in Fortran's order are read."""
    np.save(tmp_path / "vectors.npy", np.asfortranarray(corpus))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert mapped.flags.f_contiguous
    index, prompts = filled("Flat", corpus), queries(3)
    wanted = select(index, prompts, 5, num_candidates=N, embeddings=corpus)
    whole = torch.Tensor.contiguous

    def contiguous(tensor: Any) -> Any:
        assert len(tensor) < M, "the corpus is copied"
        return whole(tensor)

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    assert same(select(index, prompts, 5, num_candidates=N, embeddings=mapped), wanted)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_embeddings_of_another_dtype(dtype: str, corpus: Any) -> None:
    index, prompts = filled("Flat", corpus), queries(3)
    chosen = select(index, prompts, 10, num_candidates=N, embeddings=corpus.astype(dtype))
    wanted = hullkit.select(
        torch.from_numpy(corpus.astype(dtype)),
        torch.from_numpy(prompts.astype(dtype)),
        10,
        candidates=torch.from_numpy(index.search(prompts, N)[1]),
    )
    assert same(chosen, wanted)


def test_queries_of_every_kind(corpus: Any) -> None:
    """Whatever memory they lie in: those that `search` takes, with the same answer."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="an extra is not installed")
    index = filled("Flat", corpus)
    prompts = np.rint(8 * queries(3)) / 8  # bfloat16 holds them
    read_only = prompts.copy()
    read_only.flags.writeable = False
    tensor = torch.from_numpy(prompts)
    wanted = select(index, prompts, 5, num_candidates=N)
    for query in (
        prompts[::-1][::-1], prompts[:, ::-1].copy()[:, ::-1], read_only, prompts.tolist(),
        prompts.astype(">f4"), prompts.astype(">f8"), prompts.astype(ml_dtypes.bfloat16),
        tensor.double(), tensor.bfloat16(), tensor.clone().requires_grad_(),
    ):  # fmt: skip
        assert same(select(index, query, 5, num_candidates=N), wanted)
        assert torch.equal(search(index, query, N)[0], search(index, prompts, N)[0])


def test_ids_that_are_no_rows(corpus: Any) -> None:
    for shift in (1, M, -2):
        index = faiss.IndexIDMap(faiss.IndexFlatL2(D))
        index.add_with_ids(corpus, np.arange(M) + shift)
        query = corpus[M - 1] if shift > 0 else corpus[0]
        strange = M - 1 + shift if shift > 0 else shift
        for given, row in ((corpus, query), (torch.from_numpy(corpus), torch.from_numpy(query))):
            with pytest.raises(
                ValueError, match=f"embeddings: expected a row for each id .* and the id {strange}"
            ):
                select(index, row, 5, num_candidates=1, embeddings=given)


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False])
def test_candidates_alone_go_to_the_device(in_place: bool, corpus: Any) -> None:
    index, prompts = filled("Flat", corpus), queries(3)
    embeddings = corpus if in_place else None
    chosen = select(index, prompts, 10, num_candidates=N, embeddings=embeddings, device="cuda")
    assert chosen.rows.is_cuda
    wanted = select(index, prompts, 10, num_candidates=N)
    assert torch.equal(chosen.counts.sum(1).cpu(), wanted.counts.sum(1))
    assert torch.equal(chosen.rows[:, 0].cpu(), wanted.rows[:, 0])


def test_refusals(corpus: Any) -> None:
    index = filled("Flat", corpus)
    broken = queries(2)
    broken[0, 1] = np.nan
    for bad, message in (
        (np.ones((2, D + 1), np.float32), r"query: expected shape \(B, 16\), got \(2, 17\)"),
        (np.ones((2, 2, D), np.float32), r"query: expected shape \(B, 16\)"),
        (np.ones((2, D, D), np.float32), r"query: expected shape \(B, 16\)"),
        (broken, "query: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            select(index, bad, 5)
    with pytest.raises(ValueError, match="num_candidates: expected"):
        search(index, queries(1), 0)
    with pytest.raises(TypeError, match="embeddings: expected an array or a tensor, got str"):
        search(index, queries(1), 4, embeddings="corpus.npy")
    for wrong in (corpus[:, 1:], corpus[:, :, None]):
        with pytest.raises(ValueError, match=r"embeddings: expected shape \(M, 16\)"):
            search(index, queries(1), 4, embeddings=wrong)
    with pytest.raises(ValueError, match="embeddings: expected a row for each id of the index"):
        search(index, queries(1), 4, embeddings=corpus[:1])
    with pytest.raises(ValueError, match=r"query: expected numbers that torch\.float16 holds"):
        select(index, 1e6 * queries(1), 4, embeddings=corpus.astype(np.float16))
    with pytest.raises(TypeError, match="lengths: the index says"):
        select(index, queries(1), 4, lengths=[3])


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "knn"},
        {"method": "sift"},
        {"merge_duplicates": 0.1},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_embeddings_that_are_not_finite(
    options: Any, on_disk: bool, tmp_path: Path, corpus: Any
) -> None:
    """The row of `embeddings` is named, and no row that is not a candidate counts."""
    index, prompts = filled("Flat", corpus), queries(3)
    ids = index.search(prompts, 4)[1]
    embeddings = corpus.copy()
    embeddings[np.setdiff1d(np.arange(M), ids)] = np.inf
    select(index, prompts, 3, num_candidates=4, embeddings=embeddings, **options)
    broken = int(ids[1, 2])
    embeddings[broken, 3:] = np.nan
    if on_disk:
        np.save(tmp_path / "vectors.npy", embeddings)
        embeddings = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    message = rf"^embeddings\[{broken}\]: expected finite values, got nan in coordinate 3$"
    with pytest.raises(ValueError, match=message):
        select(index, prompts, 3, num_candidates=4, embeddings=embeddings, **options)


def test_a_candidate_that_is_not_finite_beside_a_short_list(corpus: Any) -> None:
    """Places without a candidate do not shift the row that is named."""
    index, broken = filled("IVF40,Flat", corpus), corpus.copy()
    ids = index.search(queries(5), N)[1]
    short = int((ids < 0).any(1).argmax())
    row = int(ids[short][ids[short] >= 0][-1])
    broken[row, 1] = -np.inf
    with pytest.raises(ValueError, match=rf"^embeddings\[{row}\]: .* got -inf in coordinate 1$"):
        select(index, queries(5)[short], 5, num_candidates=N, embeddings=broken)


def test_ids_below_zero() -> None:
    """As hashes are: of ids below 0 only -1 means that nothing was found."""
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(2))
    vectors = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    ids = np.array([-7, 5, -(2**62)])
    index.add_with_ids(vectors, ids)
    found, pool, rows = search(index, np.array([0.6, 0.8], np.float32), 4)
    assert found.tolist() == [[5, -7, -(2**62), -1]]
    assert rows.tolist() == [[0, 1, 2, -1]]
    assert pool[:3].tolist() == vectors[[1, 0, 2]].tolist()
    chosen = select(index, np.array([0.6, 0.8], np.float32), 10, num_candidates=3)
    assert dict(zip(chosen.rows.tolist(), chosen.counts.tolist(), strict=True)) == {
        5: 6,
        -7: 4,
        -1: 0,
    }


def test_an_index_of_vectors_that_are_not_finite() -> None:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(2))
    vectors = np.array([[1, 0], [0, 1], [np.inf, 1]], np.float32)
    index.add_with_ids(vectors, np.array([7, 5, 70]))
    message = r"^index\[70\]: expected finite values, got inf in coordinate 0$"
    with pytest.raises(ValueError, match=message):
        select(index, np.ones((2, 2), np.float32), 2, num_candidates=2)


@pytest.mark.parametrize("stored", [True, False])
def test_vectors_that_are_too_large(stored: bool) -> None:
    index = faiss.IndexFlatIP(2)
    index.add(np.full((3, 2), 2e38, np.float32))
    embeddings = None if stored else np.full((3, 2), 2e38, np.float32)
    source = "index" if stored else "embeddings"
    with pytest.raises(ValueError, match=f"^{source}: expected inner products .* an overflow"):
        select(index, np.ones(2, np.float32), 2, num_candidates=2, embeddings=embeddings)


def test_the_dtype_of_embeddings_comes_before_the_search(
    tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = filled("Flat", corpus)
    np.save(tmp_path / "vectors.npy", np.rint(100 * corpus).astype(np.int32))
    embeddings = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    monkeypatch.setattr(index, "search", lambda *_: pytest.fail("searched"))
    for call in (select, search):
        with pytest.raises(TypeError, match=r"^embeddings: expected dtype .* got torch.int32$"):
            call(index, queries(1), 5, embeddings=embeddings)


@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "IVF8,Flat"])
@pytest.mark.parametrize("in_place", [True, False])
def test_an_empty_index(kind: str, in_place: bool) -> None:
    embeddings = np.empty((0, D), np.float32) if in_place else None
    with pytest.raises(ValueError, match=r"^index: expected at least one vector, got none$"):
        select(faiss.index_factory(D, kind), queries(1), 5, embeddings=embeddings)


@pytest.mark.parametrize("kind", ["IVF8,Flat", "PCA16,IVF8,Flat"])
@pytest.mark.parametrize("method", ["hull", "knn", "sift"])
def test_probed_lists_that_are_empty(kind: str, method: str, corpus: Any) -> None:
    index = faiss.index_factory(D, kind)
    index.train(corpus)
    near, far = corpus[:1], -corpus[:1]
    index.add(near)
    prompts = np.concatenate([near, far])
    message = (
        "^index: expected a candidate for each query, got none of 1 vectors for query 1 in the "
        "lists of nprobe=1. A larger nprobe visits more of them$"
    )
    for embeddings in (None, near):
        with pytest.raises(ValueError, match=message):
            select(index, prompts, 1, num_candidates=4, method=method, embeddings=embeddings)
    assert search(index, prompts, 2)[0].tolist() == [[0, -1], [-1, -1]]
    faiss.extract_index_ivf(index).nprobe = 8
    assert select(index, prompts, 1, num_candidates=4, method=method).rows.tolist() == [[0], [0]]


def test_an_index_without_lists_that_finds_nothing() -> None:
    index = faiss.IndexFlatIP(2)
    index.add(np.full((3, 2), np.nan, np.float32))  # nearer than nothing is not true of NaN
    message = "^index: expected a candidate for each query, got none of 3 vectors for query 0$"
    with pytest.raises(ValueError, match=message):
        select(index, np.ones(2, np.float32), 2)


@pytest.mark.parametrize(
    "index",
    ["index", Path("index"), None, faiss.IndexBinaryFlat(D)],
    ids=lambda i: type(i).__name__,
)
def test_what_is_no_index(index: Any) -> None:
    message = f"^index: expected a faiss.Index of floats, got {type(index).__name__}. .*read_index"
    for call in (select, search):
        with pytest.raises(TypeError, match=message):
            call(index, queries(1), 5)


def test_an_index_that_cannot_reconstruct(corpus: Any) -> None:
    ids = np.arange(M)
    index = faiss.IndexIDMap(faiss.IndexFlatL2(D))
    index.add_with_ids(corpus, ids)
    message = "^index: expected one that can reconstruct .* got IndexIDMap. Pass .* embeddings="
    for call in (select, search):
        with pytest.raises(ValueError, match=message):
            call(index, queries(2), 5)
    chosen = select(index, queries(2), 5, num_candidates=N, embeddings=corpus)
    assert same(chosen, select(filled("Flat", corpus), queries(2), 5, num_candidates=N))
    untrained = faiss.index_factory(D, "IVF8,Flat")
    with pytest.raises(RuntimeError, match="trained"):  # no question of vectors
        search(untrained, queries(1), 5)


def test_an_index_of_a_part_of_the_corpus(corpus: Any) -> None:
    """And no prompts at all."""
    ids = np.arange(100, 300)
    index = faiss.IndexIDMap(faiss.IndexFlatL2(D))
    index.add_with_ids(corpus[ids], ids)
    prompts = queries(3)
    chosen = select(index, prompts, 5, num_candidates=20, embeddings=corpus)
    found = index.search(prompts, 20)[1]
    for rows, counts, own in zip(chosen.rows, chosen.counts, found, strict=True):
        assert set(rows[counts > 0].tolist()) <= set(own.tolist())
    for embeddings in (corpus, None):
        own = index if embeddings is not None else filled("Flat", corpus)
        assert select(own, prompts[:0], 5, embeddings=embeddings).rows.shape == (0, 5)
