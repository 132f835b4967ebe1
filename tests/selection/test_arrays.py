# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries: the answers of the same tensors, in kind, without copies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from hullkit._arrays import tensor_of
from hullkit.interop import activeft, hullft
from torch import Tensor


class Exported:
    """An array of a library of our own: what DLPack asks for, around memory of another's."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __dlpack__(self, **options: Any) -> Any:
        return self.owner.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.owner.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return Exported

    @staticmethod
    def from_dlpack(array: Any) -> Exported:
        return Exported(torch.from_dlpack(array))


def to_jax(tensor: Tensor) -> Any:
    return pytest.importorskip("jax.numpy").from_dlpack(tensor)


def from_jax(array: Any) -> Any:
    assert type(array).__module__.startswith("jax")
    return np.asarray(array)


def from_numpy(array: Any) -> Any:
    assert isinstance(array, np.ndarray)
    return array


def from_exported(array: Any) -> Any:
    assert isinstance(array, Exported)
    return array.owner.cpu().numpy()


# Into the library, and out of it with a proof that the result is its own.
LIBRARIES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "numpy": (lambda tensor: tensor.numpy(), from_numpy),
    "dlpack": (lambda tensor: Exported(tensor.numpy()), from_exported),
    "jax": (to_jax, from_jax),
    "device": (lambda tensor: Exported(tensor.cuda()), from_exported),
}
PARAMETERS = [*list(LIBRARIES)[:3], pytest.param("device", marks=pytest.mark.gpu)]


def problem(*, batch: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(30, 6, generator=generator)
    shape = (6,) if batch is None else (batch, 6)
    return pool, torch.randn(shape, generator=generator) / 3


def same(ours: Any, wanted: Any, out: Callable[[Any], Any]) -> None:
    assert type(ours) is type(wanted) or isinstance(wanted, Tensor)
    if wanted is None:  # what a method has nothing to say of
        return
    if not isinstance(wanted, Tensor):
        for one, other in zip(ours, wanted, strict=True):
            same(one, other, out)
        return
    array = out(ours)
    # JAX's arrays are of 32 bits unless told otherwise.
    assert np.array_equal(array, wanted.cpu().numpy().astype(array.dtype))


@pytest.mark.parametrize("library", PARAMETERS)
def test_every_function(library: str) -> None:
    into, out = LIBRARIES[library]
    device = "cuda" if library == "device" else "cpu"
    pool, query = (tensor.to(device) for tensor in problem())
    arrays = [into(tensor.cpu()) for tensor in (pool, query)]

    same(hullkit.lmo(*arrays), hullkit.lmo(pool, query), out)
    same(hullkit.knn(*arrays, 4), hullkit.knn(pool, query, 4), out)
    same(hullkit.duplicates(arrays[0], eps=0.5), hullkit.duplicates(pool, eps=0.5), out)
    result, wanted = hullkit.frank_wolfe(*arrays), hullkit.frank_wolfe(pool, query)
    same(result, wanted, out)
    same(
        hullkit.round_multiplicities(*arrays, result, 9),
        hullkit.round_multiplicities(pool, query, wanted, 9),
        out,
    )
    same(hullkit.apportion(result.weights, 9), hullkit.apportion(wanted.weights, 9), out)
    options = {"max_multiplicity": 2, "merge_duplicates": 0.1}
    same(hullkit.select(*arrays, 9, **options), hullkit.select(pool, query, 9, **options), out)
    same(hullkit.sift(*arrays, 9), hullkit.sift(pool, query, 9), out)
    same(hullkit.select(*arrays, 9), hullkit.select(pool, query, 9), out)
    same(
        hullkit.select(*arrays, 9, method="knn"), hullkit.select(pool, query, 9, method="knn"), out
    )


@pytest.mark.parametrize("library", PARAMETERS)
def test_batches_lengths_and_candidates(library: str) -> None:
    into, out = LIBRARIES[library]
    device = "cuda" if library == "device" else "cpu"
    pool, queries = problem(batch=3)
    candidates = torch.tensor([[4, 9, 2, -1], [1, 0, 29, 8], [5, 6, 7, 3]], dtype=torch.int32)
    lengths = torch.tensor([4, 2, 3])
    options = {"candidates": candidates, "lengths": lengths}
    arrays = {name: into(tensor) for name, tensor in options.items()}
    tensors = {name: tensor.to(device) for name, tensor in options.items()}
    same(
        hullkit.select(pool=into(pool), query=into(queries), total=5, **arrays),
        hullkit.select(pool.to(device), queries.to(device), 5, **tensors),
        out,
    )


def test_numpy_shapes_and_types() -> None:
    pool, query = (tensor.double().numpy() for tensor in problem())
    result = hullkit.frank_wolfe(pool, query)
    assert result.indices.dtype == np.int64
    assert result.weights.dtype == np.float64
    assert result.status.shape == ()
    assert hullkit.Status(int(result.status)) in hullkit.Status
    reference = hullkit.frank_wolfe(pool, query, backend="reference")
    assert np.array_equal(result.indices, reference.indices)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_no_queries(backend: str | None) -> None:
    """NumPy gives an empty array strides of 0, unless it is a slice."""
    pool, dtype = problem()[0].numpy(), np.float32
    for query in (np.zeros((0, 6), dtype), pool[:0]):
        assert hullkit.lmo(pool, query, backend=backend).index.shape == (0,)
        assert hullkit.knn(pool, query, 4, backend=backend).indices.shape == (0, 4)
        result = hullkit.frank_wolfe(pool, query, max_support=5, backend=backend)
        assert result.weights.shape == (0, 5)
        empty = result._replace(indices=np.zeros((0, 5), np.int64), weights=np.zeros((0, 5)))
        counts = hullkit.round_multiplicities(pool, query, empty, 9, backend=backend)
        assert counts.shape == (0, 5)
        assert hullkit.apportion(np.zeros((0, 5)), 9, backend=backend).shape == (0, 5)
        assert hullkit.sift(pool, query, 9, backend=backend).order.shape == (0, 9)
        for method in ("hull", "sift"):
            chosen = hullkit.select(pool, query, 9, method=method, backend=backend)
            assert chosen.counts.shape == (0, 9)
        own = np.zeros((0, 7, 6), dtype)
        assert hullkit.duplicates(own, eps=0.1, backend=backend).shape == (0, 7)
        assert hullkit.sift(own, query, 9, backend=backend).order.shape == (0, 9)
        rows, lengths = np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
        chosen = hullkit.select(pool, query, 3, candidates=rows, lengths=lengths, backend=backend)
        assert chosen.rows.shape == (0, 3)


def test_memory_is_shared(tmp_path: Path) -> None:
    owned = problem()[0].numpy()
    read_only = owned.view()
    read_only.flags.writeable = False
    np.save(tmp_path / "pool.npy", owned)
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    for array in (owned, read_only, owned[3:20:2, 1:5], mapped, np.zeros((0, 3), np.float32)):
        tensor = tensor_of("pool", array)
        assert tensor.data_ptr() == array.ctypes.data or array.size == 0
        assert tensor.shape == array.shape
        assert np.array_equal(tensor.numpy(), array)
    assert not read_only.flags.writeable
    shared = tensor_of("pool", Exported(owned))
    assert shared.data_ptr() == owned.ctypes.data


def test_read_only_memory_outlives_its_array() -> None:
    array = np.arange(200_000.0)
    array.flags.writeable = False
    tensor = tensor_of("pool", array)
    del array
    np.full(200_000, 7.0)  # takes the memory over if it was freed
    assert torch.equal(tensor, torch.arange(200_000, dtype=torch.float64))


@pytest.mark.parametrize("axis", [0, 1])
def test_reversed_views(axis: int) -> None:
    pool, query = (tensor.numpy() for tensor in problem())
    flipped, turned = np.flip(pool, axis), query if axis == 0 else query[::-1]
    ours = hullkit.knn(flipped, turned, 5)
    wanted = hullkit.knn(np.ascontiguousarray(flipped), np.ascontiguousarray(turned), 5)
    same(ours, hullkit.KNNResult(*map(torch.from_numpy, wanted)), from_numpy)


def test_fields_of_records() -> None:
    records = np.zeros(30, dtype=[("id", np.int8), ("row", np.float32, 6)])
    pool, query = (tensor.numpy() for tensor in problem())
    records["row"] = pool
    assert hullkit.lmo(records["row"], query).index == hullkit.lmo(pool, query).index


def test_bfloat16_of_ml_dtypes() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    pool, query = problem()
    ours = hullkit.select(pool.numpy().astype(bfloat16), query.numpy().astype(bfloat16), 9)
    same(ours, hullkit.select(pool.bfloat16(), query.bfloat16(), 9), from_numpy)


def test_kinds_do_not_mix() -> None:
    pool, query = problem()
    with pytest.raises(TypeError, match=r"query: expected a torch\.Tensor, got ndarray"):
        hullkit.select(pool, query.numpy(), 9)
    with pytest.raises(
        TypeError,
        match=r"direction: expected an array of pool's kind, numpy\.ndarray, got torch\.Tensor",
    ):
        hullkit.lmo(pool.numpy(), query)
    with pytest.raises(
        TypeError,
        match=r"query: expected an array of pool's kind, \w+\.Exported, got numpy\.ndarray",
    ):
        hullkit.frank_wolfe(Exported(pool.numpy()), query=query.numpy())
    result = hullkit.frank_wolfe(pool, query)
    with pytest.raises(TypeError, match=r"result\.indices: expected an array of pool's kind, num"):
        hullkit.round_multiplicities(pool.numpy(), query.numpy(), result, 9)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), dtype=">f4"), r"numpy\.ndarray of dtype >f4 \(.*byte order"),
        (np.array([["a"]]), r"numpy\.ndarray of dtype <U1 \(can't convert"),
        (np.array([[None]]), r"numpy\.ndarray of dtype object \(can't convert"),
        (Exported(np.array([["a"]])), r"\w+\.Exported of dtype unknown \("),
    ],
)
def test_unreadable_arrays(array: Any, message: str) -> None:
    with pytest.raises(
        TypeError, match=rf"pool: expected an array that torch can read in place, got {message}"
    ):
        hullkit.lmo(array, array)


def test_readable_arrays_are_checked_as_tensors_are() -> None:
    pool, query = (tensor.numpy() for tensor in problem())
    with pytest.raises(TypeError, match=r"pool: expected dtype float64, .*got torch\.int64"):
        hullkit.lmo(pool.astype(np.int64), query)
    with pytest.raises(ValueError, match=r"query: expected d = 6 coordinates"):
        hullkit.knn(pool, query[:5], 3)
    with pytest.raises(TypeError, match=r"pool: expected a torch\.Tensor or an array .*, got list"):
        hullkit.lmo(pool.tolist(), query.tolist())
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'pool'"):
        hullkit.lmo(direction=query)


@pytest.mark.parametrize("name", ["query", "candidates", "lengths"])
def test_what_is_neither_tensor_nor_array_is_named_beside_the_pools_kind(name: str) -> None:
    tensors = dict(zip(("pool", "query"), problem(), strict=True))
    given = {key: value.numpy() for key, value in tensors.items()} | {name: [0, 1]}
    with pytest.raises(TypeError, match=rf"{name}: .* pool's kind, numpy\.ndarray, got list"):
        hullkit.knn(**given, k=1)
    with pytest.raises(TypeError, match=rf"{name}: expected a torch\.Tensor, got list"):
        hullkit.knn(**tensors | {name: [0, 1]}, k=1)


def test_lists_in_a_result_are_named() -> None:
    pool, query = (tensor.numpy() for tensor in problem())
    result = SimpleNamespace(indices=[0, 1], weights=np.ones(2))
    with pytest.raises(TypeError, match=r"result\.indices: .* numpy\.ndarray, got list"):
        hullkit.round_multiplicities(pool, query, result, 9)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_named() -> None:
    pool, query = problem()
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([pool, pool[:2]], layout=layout)
        with pytest.raises(TypeError, match="pool: expected a dense tensor, got"):
            hullkit.knn(nested, query.expand(2, 6), 1)


def test_other_results_are_named() -> None:
    pool, query = (tensor.numpy() for tensor in problem())
    others = hullkit.knn(pool, query, 2), hullkit.select(pool, query, 5), hullkit.lmo(pool, query)
    for other in others:
        field = "weights" if hasattr(other, "indices") else "indices"
        message = (
            rf"result: expected a FrankWolfeResult, got {type(other).__name__} without {field}"
        )
        with pytest.raises(TypeError, match=message):
            hullkit.round_multiplicities(pool, query, other, 5)


def test_masks_are_refused() -> None:
    """Every argument that takes an array, and every adapter: a tensor would show what is masked."""
    pool, queries = (tensor.numpy() for tensor in problem(batch=3))
    candidates, lengths = np.arange(12).reshape(3, 4), np.array([3, 4, 1])
    result = hullkit.frank_wolfe(pool, queries)
    calls: dict[str, Callable[[Any], Any]] = {
        "pool": lambda masked: hullkit.lmo(masked(pool), queries),
        "query": lambda masked: hullkit.select(pool, query=masked(queries), total=3),
        "direction": lambda masked: hullkit.lmo(pool, masked(queries)),
        "candidates": lambda masked: hullkit.knn(pool, queries, 3, candidates=masked(candidates)),
        "lengths": lambda masked: hullkit.sift(pool, queries, 3, lengths=masked(lengths)),
        "result.weights": lambda masked: hullkit.round_multiplicities(
            pool, queries, result._replace(weights=masked(result.weights)), 9
        ),
        "weights": lambda masked: hullkit.apportion(masked(result.weights), 9),
        "counts": lambda masked: hullkit.reuse_schedule(masked(lengths)),
        "embeddings": lambda masked: hullft.FWSelector().select(masked(pool), queries, 3),
        "query_embedding": lambda masked: hullft.SIFTSelector().select(pool, masked(queries), 3),
        "support_embeddings": lambda masked: hullft.integerize_by_geometry(
            lengths, np.ones(3), masked(pool[:3]), queries[0], 9
        ),
        "target": lambda masked: hullft.integerize_by_geometry(
            lengths, np.ones(3), pool[:3], masked(queries[0]), 9
        ),
        "indices": lambda masked: hullft.pad_by_weights_deterministic(
            masked(lengths), np.ones(3), 9
        ),
        "queries": lambda masked: activeft.Retriever(flat).batch_search(masked(queries[None]), 3),
    }
    for name, call in calls.items():
        if name == "queries":
            faiss = pytest.importorskip("faiss", reason="faiss is not installed")
            flat = faiss.IndexFlatIP(6)
        else:
            call(np.asarray)
        for mask in (False, True):  # whether or not anything is masked
            with pytest.raises(TypeError) as caught:
                call(lambda array, mask=mask: np.ma.masked_array(array, mask=mask))
            expected = f"{name}: expected an array without a mask, got numpy.MaskedArray. Pass "
            assert str(caught.value).startswith(expected)


class NoWayBack:
    """Exports memory, but its library takes none."""

    def __init__(self, owner: Any) -> None:
        self.__dlpack__ = owner.__dlpack__
        self.__dlpack_device__ = owner.__dlpack_device__


def test_library_without_from_dlpack() -> None:
    pool, query = (NoWayBack(tensor.numpy()) for tensor in problem())
    with pytest.raises(TypeError, match=r"pool: expected an array whose library can take the res"):
        hullkit.lmo(pool, query)


def test_a_library_named_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without __array_namespace__, from_dlpack is looked for where the class comes from."""
    package = sys.modules[__name__.partition(".")[0]]
    monkeypatch.setattr(package, "from_dlpack", Exported.from_dlpack, raising=False)
    pool, query = problem()
    ours = hullkit.lmo(NoWayBack(pool.numpy()), NoWayBack(query.numpy()))
    same(ours, hullkit.lmo(pool, query), from_exported)
