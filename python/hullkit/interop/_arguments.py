# SPDX-License-Identifier: Apache-2.0
"""Arguments as other people's code passes them: arrays of any dtype, integers of NumPy."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from torch import Tensor

from .._arrays import tensor_of, to_numpy
from .._checks import check_floating, check_int


def floating(name: str, array: Any) -> Tensor:
    """A float32 or float64 tensor, whichever holds the array's values."""
    array = to_numpy(name, array)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.result_type(array.dtype, np.float32))
    return check_floating(name, tensor_of(name, array))


def renamed(error: Exception, **names: str) -> Exception:
    """The error of an argument of ours, by the name that the caller has for it."""
    name, _, words = str(error).partition(":")
    return type(error)(f"{names[name]}:{words}") if name in names else error


@contextmanager
def callers_names(**names: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise renamed(error, **names) from None


def check_index(index: Any) -> None:
    import faiss

    if not isinstance(index, faiss.Index):
        raise TypeError(
            f"index: expected a faiss.Index of floats, got {type(index).__name__}. "
            "faiss.read_index reads one from a file"
        )


def reconstructed(index: Any, queries: Any, k: int, instead: str) -> tuple[Any, Any, Any]:
    """What faiss finds, products or distances and ids, and its vectors as the index has them.

    The id is -1 where it found no more.

    instead: what to do with an index that does not have them.
    """
    try:
        found: tuple[Any, Any, Any] = index.search_and_reconstruct(queries, k)
        # An id may be any number but -1; faiss reconstructs none below 0 here.
        below = found[1] < -1
        if below.any():
            found[2][below] = index.reconstruct_batch(found[1][below])
    except RuntimeError as error:
        index.search(queries, k)  # raises what has nothing to do with the vectors
        raise ValueError(
            "index: expected one that can reconstruct its vectors, got "
            f"{type(index).__name__}. {instead}"
        ) from error
    return found


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`check_int` for whatever is an integer to Python, NumPy's too."""
    with suppress(TypeError):
        value = operator.index(value)
    checked: int = check_int(name, value, minimum, maximum)
    return checked
