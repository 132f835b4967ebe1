# SPDX-License-Identifier: Apache-2.0
"""Selection from any faiss index: the pool is searched, the corpus is never loaded.

An IVF index may lie on disk: `faiss.read_index(path, faiss.IO_FLAG_MMAP)` reads only the lists that
a search visits. Embeddings may be `numpy.load(path, mmap_mode="r")` or a tensor of safetensors'
`safe_open`, of which only the candidates' rows are read. Needs faiss, which brings the index.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arrays import is_array, tensor_of, to_numpy
from .._checks import check_floating, check_int
from ..selection import Multiset
from ..selection import select as select_rows
from ._arguments import check_index, floating, reconstructed, renamed

__all__ = ["Texts", "search", "select"]


def search(
    index: Any, query: Any, num_candidates: int, *, embeddings: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of each prompt, and where their vectors lie.

    Args:
        index: any `faiss.Index`. Without `embeddings` it must be able to reconstruct its vectors,
            as flat, IVF and HNSW indices do; quantized ones reconstruct approximations.
        query: `(B, d)` or `(d,)`, an array or a tensor on the CPU; faiss gets it in float32.
        num_candidates: n >= 1, the most for one prompt.
        embeddings: `(M, d)`, row i the vector of id i of the index, which may have some of these
            ids only: an array or tensor of float64, float32, float16 or bfloat16, also one that
            lies on disk. None for the vectors of the index.
    Returns:
        ids `(B, n)` int64 in the index, -1 where faiss found no more; a pool of vectors; and each
        candidate's row in that pool, `(B, n)`, -1 = none. With `embeddings` the pool is these,
        in place, and rows are ids. Otherwise the pool has the candidates of this call alone.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; a query with NaN or
            infinity, which faiss would take; ids of the index that are no rows of `embeddings`; an
            index that cannot reconstruct its vectors, without `embeddings`.

    >>> import faiss, numpy as np
    >>> from hullkit.interop.faiss import search
    >>> index = faiss.IndexFlatL2(2)
    >>> index.add(np.array([[0, 1], [1, 0], [1, 1]], dtype="float32"))
    >>> search(index, np.array([1, 0], dtype="float32"), 2)[0]
    tensor([[1, 2]])

    Cost: faiss's search, and n rows of d numbers for each prompt.
    """
    return _found(index, _prompts(index, query), num_candidates, embeddings)


def _prompts(index: Any, query: Any) -> Tensor:
    """The query (B, d) in float32 or float64, whichever holds its values."""
    check_index(index)
    if isinstance(query, Tensor):
        query = query.detach()
        # NumPy has no bfloat16.
        query = query.float() if query.dtype is torch.bfloat16 else query
    prompts: Tensor = torch.atleast_2d(floating("query", query))
    if prompts.ndim != 2 or prompts.shape[1] != index.d:
        raise ValueError(f"query: expected shape (B, {index.d}), got {tuple(prompts.shape)}")
    if not prompts.to(torch.float32).isfinite().all():
        raise ValueError("query: expected finite numbers, got NaN or infinity")
    return prompts


def _found(
    index: Any, prompts: Tensor, num_candidates: int, embeddings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_candidates = check_int("num_candidates", num_candidates, 1)
    queries = prompts.to(torch.float32).numpy()
    if embeddings is None:
        _, ids, vectors = reconstructed(index, queries, num_candidates, "Pass them as embeddings=")
        rows = np.where(ids == -1, -1, np.arange(ids.size).reshape(ids.shape))
        pool = torch.from_numpy(vectors.reshape(-1, index.d))
        return torch.from_numpy(ids), pool, torch.from_numpy(rows)
    if not is_array(embeddings):
        kind = type(embeddings).__name__
        raise TypeError(f"embeddings: expected an array or a tensor, got {kind}")
    pool = embeddings if isinstance(embeddings, Tensor) else tensor_of("embeddings", embeddings)
    check_floating("embeddings", pool)
    if pool.ndim != 2 or pool.shape[1] != index.d:
        raise ValueError(f"embeddings: expected shape (M, {index.d}), got {tuple(pool.shape)}")
    ids = torch.from_numpy(index.search(queries, num_candidates)[1])
    strange = ids[(ids < -1) | (ids >= len(pool))]  # an index may have ids of its own
    if len(strange):
        raise ValueError(
            f"embeddings: expected a row for each id of the index, got {len(pool)} rows and the "
            f"id {int(strange[0])}"
        )
    return ids, pool, ids


def select(
    index: Any,
    query: Any,
    total: Any,
    *,
    num_candidates: int = 200,
    embeddings: Any = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Multiset:
    """:func:`hullkit.select` among the candidates that an index finds; `rows` are the index's ids.

    All prompts' pools are one native call.

    Args:
        index, query, num_candidates, embeddings: as in :func:`search`.
        total, options: as in :func:`hullkit.select`.
        device: where to choose; None for the device of `embeddings`, else the CPU. With another
            device the candidates' rows alone are copied there.
    Returns:
        Multiset of tensors. `indices` are positions among the candidates of a prompt. Without B for
        a query `(d,)`.
    Raises:
        As :func:`search` and :func:`hullkit.select`; `lengths` and `candidates` are not options.
        ValueError: an empty index; on a CPU also a query for which the index finds nothing, and NaN
            or infinity in a candidate's vector.

    >>> import faiss, numpy as np
    >>> from hullkit.interop.faiss import select
    >>> index = faiss.IndexFlatL2(2)
    >>> index.add(np.array([[0, 1], [1, 0], [1, 1]], dtype="float32"))
    >>> chosen = select(index, np.array([1, 0], dtype="float32"), 4, num_candidates=2)
    >>> chosen.rows[:1], chosen.counts[:1]
    (tensor([1]), tensor([4]))
    """
    for name in ("lengths", "candidates"):
        if name in options:
            raise TypeError(f"{name}: the index says which candidates there are")
    prompts = _prompts(index, query)
    if not index.ntotal:
        raise ValueError("index: expected at least one vector, got none")
    ids, pool, rows = _found(index, prompts, num_candidates, embeddings)
    vectors = prompts.to(pool.dtype)
    if not vectors.isfinite().all():
        raise ValueError(f"query: expected numbers that {pool.dtype} holds, as embeddings")
    if not len(vectors):
        pool = pool.new_zeros(1, pool.shape[1])  # which nobody reads
    if device is not None and torch.device(device) != pool.device:
        pool, rows = _gathered(pool, rows)
        pool, rows, vectors = (part.to(device) for part in (pool, rows, vectors))
    try:
        chosen: Multiset = select_rows(
            pool, vectors.to(pool.device), total, candidates=rows.to(pool.device), **options
        )
    except ValueError as error:
        if not str(error).startswith(("pool:", "candidates:")):
            raise
        source = "index" if embeddings is None else "embeddings"
        raise _in_callers_words(error, index, source, ids, pool, rows) from None
    places = chosen.indices
    found = ids.to(places.device).gather(-1, places.clamp_min(0))
    chosen = chosen._replace(rows=torch.where(places < 0, places, found))
    return chosen if np.ndim(query) > 1 else _unbatched(chosen)


def _gathered(pool: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in use, read in order, and each candidate's place among them."""
    used, places = torch.unique(rows.clamp_min(0), return_inverse=True)
    return pool[used], torch.where(rows < 0, rows, places)


def _in_callers_words(
    error: ValueError, index: Any, source: str, ids: Tensor, pool: Tensor, rows: Tensor
) -> Exception:
    """The error of a selection whose caller has an index, and no `pool` or `candidates`.

    source: the argument that the pool's vectors are of. Looks for the cause in the candidates'
    rows alone, one query's at a time.
    """
    for query, taken in enumerate(rows.cpu()):
        found = taken >= 0
        if not found.any():
            return ValueError(
                f"index: expected a candidate for each query, got none of {index.ntotal} vectors "
                f"for query {query}{_probes(index)}"
            )
        vectors = pool[taken[found].to(pool.device)]
        broken = vectors.isfinite().logical_not().nonzero()
        if len(broken):
            place, coordinate = broken[0].tolist()
            return ValueError(
                f"{source}[{int(ids[query][found][place])}]: expected finite values, got "
                f"{float(vectors[place, coordinate])} in coordinate {coordinate}"
            )
    return renamed(error, pool=source)  # finite, but too large


def _probes(index: Any) -> str:
    """What a query without a candidate means for an IVF index, whatever it is wrapped in."""
    import faiss

    lists = faiss.try_extract_index_ivf(index)
    if lists is None:
        return ""
    return f" in the lists of nprobe={lists.nprobe}. A larger nprobe visits more of them"


def _unbatched(value: Any) -> Any:
    """The only entry of a batch of one."""
    if isinstance(value, Tensor):
        return value[0]
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return type(value)._make(_unbatched(part) for part in value)
    return value


class Texts(Sequence[str]):
    """Texts of one file by their places in it; nothing but the text that is asked for is read.

    Text i is the bytes `offsets[i]` to `offsets[i + 1]` of the file, in UTF-8. Pickled, it is the
    path and the offsets, or the path of a file of offsets that is mapped as a whole.

    Args:
        path: the file.
        offsets: `(M + 1,)` integers, not falling, the last at most the file's size. An array that
            lies on disk is read at two places for each text; only its ends are checked at once.
    Raises:
        TypeError, ValueError: bad offsets; bytes that are no text, or were cut off since. OSError:
            no such file. IndexError: no such text.

    >>> import tempfile
    >>> from hullkit.interop.faiss import Texts
    >>> file = tempfile.NamedTemporaryFile()
    >>> _ = file.write("oneäntwo".encode()), file.flush()
    >>> texts = Texts(file.name, [0, 3, 9])
    >>> len(texts), texts[0], texts[-1]
    (2, 'one', 'äntwo')
    """

    def __init__(self, path: str | PathLike[str], offsets: Any) -> None:
        self._offsets: NDArray[Any] = to_numpy("offsets", offsets)
        if self._offsets.ndim != 1 or self._offsets.dtype.kind not in "iu" or not len(offsets):
            got = f"shape {self._offsets.shape} of {self._offsets.dtype}"
            raise TypeError(f"offsets: expected integers of shape (M + 1,), got {got}")
        self._path = os.path.abspath(path)  # another process may be in another folder
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        first, last = int(self._offsets[0]), int(self._offsets[-1])
        if not 0 <= first <= last <= size:
            raise ValueError(f"offsets: expected places in {size} bytes, got {first} to {last}")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        begin, end = int(self._offsets[place]), int(self._offsets[place + 1])
        if not 0 <= begin <= end:
            raise ValueError(f"offsets[{place}]: expected not to fall, got {begin}, then {end}")
        found, size = b"", os.fstat(self._file).st_size
        # An offset beyond the file may be larger than any buffer.
        while end <= size and (
            part := os.pread(self._file, end - begin - len(found), begin + len(found))
        ):
            found += part
        if len(found) < end - begin:
            raise ValueError(
                f"offsets[{place}]: expected bytes {begin} to {end}, got {size} in all"
            )
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"offsets[{place}]: expected a text in UTF-8, counted in bytes, got bytes {begin} "
                f"to {end}: {error}"
            ) from error

    def __reduce__(self) -> Any:
        mapped: Any = self._offsets.base
        # A part of a mapped file has another array for its base.
        whole = isinstance(mapped, np.memmap) and isinstance(mapped.base, mmap.mmap)
        # A mapping that copies when it is written to differs from its file.
        if not whole or mapped.filename is None or mapped.mode == "c":
            return type(self), (self._path, self._offsets)
        where = (mapped.filename, mapped.dtype, "r", mapped.offset, mapped.shape)
        return _with_mapped_offsets, (type(self), self._path, where)


def _with_mapped_offsets(kind: type[Texts], path: str, where: Any) -> Texts:
    return kind(path, np.memmap(*where))
