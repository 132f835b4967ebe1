# SPDX-License-Identifier: Apache-2.0
"""HullFT-shaped code on hullkit's kernels: its selectors, its filling, its finetuning.

    from hullkit.interop import hullft
    hullft.patch("hullft")                       # the package to speed up; unpatch() undoes it

Names, arguments and returned values are those of the code published with arXiv 2605.30337, and so
are the answers, with these exceptions: ties go to the lowest index; no count turns negative (the
published exchange loses examples where one does); kNN refuses more points than there are; SIFT's
choices are exact where float32 or `fast` makes others; and finetuning runs in eval mode (no
dropout), on sequences as long as their text instead of padded ones.
"""

from __future__ import annotations

import operator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._arrays import to_numpy
from .._checks import check_below_2_63
from ..selection import apportion, round_multiplicities
from ._arguments import callers_names, floating, integer
from ._hullft_finetune import finetune_on_texts, finetune_with_approach, release
from ._hullft_selectors import FWSelector, KNNSelector, SIFTSelector
from ._patching import PackagePatch

__all__ = [
    "FWSelector",
    "KNNSelector",
    "SIFTSelector",
    "finetune_on_texts",
    "finetune_with_approach",
    "integerize_by_geometry",
    "pad_by_weights_deterministic",
    "patch",
    "release",
    "unpatch",
]

Array = NDArray[Any]


def integerize_by_geometry(
    indices: Array,
    weights: Array,
    support_embeddings: Array,
    target: Array,
    n_select: int,
    swap_passes: int = 2,
) -> tuple[Array, Array]:
    """`n_select` indices, each as often as :func:`hullkit.round_multiplicities` says, in order.

    Args:
        indices: `(m,)` integers, the support.
        weights: `(m,)` their convex weights.
        support_embeddings: `(m, d)`, the rows that `indices` name.
        target: `(d,)`, the prompt's embedding.
        n_select: the updates to spread; 0 or less for none.
        swap_passes: the most exchange passes; below 0 counts as 0.
    Returns:
        indices `(n_select,)` int64, each repeated by its count; weights `(n_select,)` float64,
        1 / n_select each. Both are empty if there is no support.
    Raises:
        TypeError, ValueError: arrays of other shapes or kinds, what was expected and what came;
            also for NaN and Inf.

    >>> import numpy as np
    >>> from hullkit.interop.hullft import integerize_by_geometry
    >>> rows, weights, query = np.array([4, 7]), np.array([0.7, 0.3]), np.array([0.7, 0.3, 0.0])
    >>> integerize_by_geometry(rows, weights, np.eye(3)[:2], query, 10)[0].tolist()
    [4, 4, 4, 4, 4, 4, 4, 7, 7, 7]
    """
    indices, n_select = _integers("indices", indices), operator.index(n_select)
    if n_select <= 0 or len(indices) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    support = floating("support_embeddings", support_embeddings)
    weights = to_numpy("weights", weights)
    if indices.ndim != 1 or weights.shape != indices.shape:
        got = f"shape {weights.shape} for indices of shape {indices.shape}"
        raise ValueError(f"weights: expected one for each index, got {got}")
    if support.ndim != 2 or len(support) != len(indices):
        raise ValueError(
            f"support_embeddings: expected the {len(indices)} rows that indices name, got shape "
            f"{tuple(support.shape)}"
        )
    query = floating("target", target).reshape(-1).to(support.dtype)
    convex: Any = SimpleNamespace(  # what round_multiplicities reads of a FrankWolfeResult
        indices=torch.arange(len(indices), device="cpu"), weights=floating("weights", weights)
    )
    passes = max(0, int(swap_passes))
    with callers_names(pool="support_embeddings", query="target", total="n_select"):
        counts = round_multiplicities(support, query, convex, n_select, exchange_passes=passes)
    return np.repeat(indices, counts.numpy()), np.full(n_select, 1.0 / n_select)


def pad_by_weights_deterministic(
    indices: Array, weights: Array, n_select: int
) -> tuple[Array, Array]:
    """`n_select` indices, each as often as :func:`hullkit.apportion` says, and their own weights.

    Args:
        indices: `(m,)` integers.
        weights: `(m,)`, one for each index. Negative ones count as 0; if all are 0 they count as
            uniform.
        n_select: how many indices to return, >= 0.
    Returns:
        indices `(n_select,)`, each repeated by its count, and each one's weight divided by the sum
        of all. Where m >= n_select, the first n_select of both, as they came; where m is 0, both
        are empty.
    Raises:
        TypeError, ValueError: an n_select below 0; weights that are not finite, or not one for each
            index.

    >>> import numpy as np
    >>> from hullkit.interop.hullft import pad_by_weights_deterministic
    >>> pad_by_weights_deterministic(np.array([4, 7]), np.array([0.7, 0.3]), 4)[0].tolist()
    [4, 4, 4, 7]
    """
    indices, weights = to_numpy("indices", indices), to_numpy("weights", weights, np.float64)
    n_select = integer("n_select", n_select, 0)
    if indices.ndim != 1 or weights.shape != indices.shape:
        raise ValueError(
            "weights: expected one for each index, "
            f"got shape {weights.shape} for indices of shape {indices.shape}"
        )
    if not np.isfinite(weights).all():
        raise ValueError("weights: expected finite numbers, got NaN or infinity")
    if not 0 < len(indices) < n_select:
        return indices[:n_select].copy(), weights[:n_select].copy()
    weights = np.maximum(weights, 0.0)
    weights = np.ldexp(weights, -np.frexp(weights.max())[1])  # their sum may be beyond float64
    total = weights.sum()
    weights = weights / total if total > 0 else np.full(len(weights), 1.0 / len(weights))
    with callers_names(total="n_select"):
        counts = apportion(torch.from_numpy(weights), n_select).numpy()
    return np.repeat(indices, counts), np.repeat(weights, counts)


def _integers(name: str, value: Any) -> Array:
    array: Array = to_numpy(name, value)
    if array.size and array.dtype.kind not in "iu":  # an empty list is of float64
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size:
        check_below_2_63(name, int(array.max()))  # what is returned is int64
    return array.astype(np.int64, copy=False)


_PATCH = PackagePatch(
    selector=(KNNSelector, SIFTSelector, FWSelector),
    fill=(integerize_by_geometry, pad_by_weights_deterministic),
    finetune=(finetune_with_approach, finetune_on_texts),
)


def patch(package: ModuleType | str) -> None:
    """Put these objects in the place of a package's own, until :func:`unpatch`.

    The package has modules `selector`, `fill` and `finetune` with the names above. Replaced is, in
    all of its modules, whatever is bound to one of the originals: the names themselves, what other
    modules (`runner`, `evaluation`) imported, and entries of dicts (the registry of selectors).
    Modules imported later get the replacements. Code outside of the package keeps what it imported.

    Args:
        package: the package, or its name.
    Raises:
        AttributeError: a name is missing; then nothing is replaced.
        RuntimeError: a package is patched already.
        ImportError: the package cannot be imported, or a module of it is missing.

    >>> import sys, types
    >>> from hullkit.interop import hullft
    >>> for room in ("selector", "fill", "finetune"):  # a package of that shape
    ...     sys.modules[f"theirs.{room}"] = types.ModuleType(f"theirs.{room}")
    ...     vars(sys.modules[f"theirs.{room}"]).update({name: object() for name in hullft.__all__})
    >>> hullft.patch("theirs")
    >>> sys.modules["theirs.fill"].integerize_by_geometry is hullft.integerize_by_geometry
    True
    >>> hullft.unpatch()
    """
    _PATCH.apply(package)


def unpatch() -> None:
    """Undo :func:`patch`: the originals are back wherever they were replaced.

    Modules of the package that were imported while it was patched get them as well.

    Raises:
        RuntimeError: nothing is patched.

    >>> from hullkit.interop import hullft
    >>> hullft.unpatch()
    Traceback (most recent call last):
    RuntimeError: unpatch: expected a patched package, got none
    """
    _PATCH.undo()
