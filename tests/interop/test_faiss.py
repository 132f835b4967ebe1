# SPDX-License-Identifier: Apache-2.0
"""Selection from faiss indices of every kind, and corpora that stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hullkit
import numpy as np
import pytest
import torch

faiss = pytest.importorskip("faiss", reason="an extra is not installed")

from hullkit.interop.faiss import Texts, search, select  # noqa: E402

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
        (broken, "query: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            select(index, bad, 5)
    with pytest.raises(ValueError, match="num_candidates: expected"):
        search(index, queries(1), 0)
    with pytest.raises(TypeError, match="embeddings: expected an array or a tensor, got str"):
        search(index, queries(1), 4, embeddings="corpus.npy")
    with pytest.raises(ValueError, match=r"embeddings: expected shape \(600, 16\)"):
        search(index, queries(1), 4, embeddings=corpus[1:])
    with pytest.raises(TypeError, match="lengths: the index says"):
        select(index, queries(1), 4, lengths=[3])


def test_texts_by_their_places(tmp_path: Path) -> None:
    parts = ["one", "", "zwölf", "three"]
    data = [part.encode() for part in parts]
    path = tmp_path / "texts"
    path.write_bytes(b"".join(data))
    offsets = np.cumsum([0, *map(len, data)])
    np.save(tmp_path / "offsets.npy", offsets)
    texts = Texts(path, np.load(tmp_path / "offsets.npy", mmap_mode="r"))
    assert list(texts) == parts
    assert (texts[-1], texts[1:3], len(texts)) == ("three", parts[1:3], 4)
    with pytest.raises(IndexError):
        texts[4]
    (tmp_path / "nothing").touch()
    assert list(Texts(tmp_path / "nothing", [0, 0])) == [""]
    with pytest.raises(ValueError, match="offsets: expected places in 14 bytes, got 0 to 99"):
        Texts(path, [0, 99])
    with pytest.raises(ValueError, match=r"offsets\[0\]: expected not to fall, got 5, then 3"):
        Texts(path, [5, 3, 9])[0]
    with pytest.raises(TypeError, match="offsets: expected integers"):
        Texts(path, [0.5, 2.0])
    with pytest.raises(FileNotFoundError):
        Texts(tmp_path / "missing", [0, 1])
