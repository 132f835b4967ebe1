# SPDX-License-Identifier: Apache-2.0
"""Weighted accumulation of gradients over a list of tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from operator import is_
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from .._checks import check_real, check_tensor
from .._tensors import DTYPES, check_backend, is_dense, same_layout, uses_triton
from . import _kernels
from ._layouts import (
    address,
    address_or_none,
    check_memory,
    check_plain,
    layouts,
    torch_swaps,
)
from ._record import AccumulateOptions, TensorRow
from ._tensor_table import TensorTable, check_disjoint
from ._watched import untraced

Key = tuple[Any, ...]


class _CheckedLists:
    """Two lists that passed every check, and the table of the accumulators."""

    def __init__(self, into: list[Tensor], grads: list[Tensor], table: TensorTable) -> None:
        self.table = table
        self._into = layouts(into)
        self._grads = layouts(grads)
        self._read: list[int] | None = None  # addresses that are none of the accumulators'
        if self._into.overlapped_by(self._grads) >= 0:
            raise ValueError(
                "grads: expected tensors that share no memory with into, but for an accumulator "
                "that is its own gradient, got one that does"
            )

    def addresses(self, into: list[Tensor], grads: list[Tensor]) -> list[int] | None:
        """The gradients' addresses; None if anything else has changed, or if they overlap."""
        if not self._into.unmoved(into, False):
            return None
        read = self._grads.addresses(grads, False)
        if read is not self._read:
            if read is None or self._into.overlapped_by(self._grads) >= 0:
                return None
            self._read = read
        return read


# The latest lists, by where the first accumulator lies, how many there are, and the backend.
_known: OrderedDict[Key, _CheckedLists] = OrderedDict()
_MAX_KNOWN = 8
# Another thread's call with the same lists would put its gradients' addresses in the place of this
# one's. A handler of signals may call meanwhile: what is kept is consistent at each instruction.
_looking = RLock()
_MAX_WEIGHT = torch.finfo(torch.float32).max
_captured_tables: list[TensorTable] = []  # that CUDA graphs read at every replay


@untraced
def accumulate_(
    into: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    weight: float = 1.0,
    *,
    norm: bool = False,
    backend: str | None = None,
) -> Tensor | None:
    """`into[i] += weight * grads[i]` for a list of tensors, in one pass.

    With weights counts_i / total this builds the mean gradient of a multiset of examples from one
    gradient for each distinct example (the accumulation form of test-time finetuning). Threads may
    call it at once; of what they add to the same accumulator, sums may be lost, as with torch.
    Equivalent to: `torch._foreach_add_(into, grads, alpha=weight)`, in float32.

    Args:
        into: float32 accumulators, dense, on one device.
        grads: gradients of the same shapes, float64, float32, float16 or bfloat16, one dtype; None
            leaves its accumulator alone.
        weight: a finite number.
        norm: whether to return the global 2-norm of the accumulators these gradients went into,
            from the same pass.
        backend: as in :class:`hullkit.optim.Adam`.
    Returns:
        0-d float64 tensor on the accumulators' device if `norm`, else None.
    Raises:
        TypeError, ValueError: lists of different lengths, shapes, devices, dtypes; a gradient that
            overlaps an accumulator, but for an accumulator that is its own gradient; nothing is
            written then.

    Numerics: a product and a sum in float32; the norm's squares in float32 within a block of a few
    thousand elements, in float64 across. Memory traffic: 3 words for each element.

    >>> import hullkit, torch
    >>> into = torch.ones(2)
    >>> hullkit.optim.accumulate_([into], [torch.ones(2)], 0.5)
    >>> into
    tensor([1.5000, 1.5000])
    """
    if len(into) != len(grads):
        raise ValueError(f"grads: expected {len(into)}, as many as into, got {len(grads)}")
    weight = check_real("weight", weight)
    if not abs(weight) <= _MAX_WEIGHT:
        raise ValueError(
            f"weight: expected a finite number within the range of float32, got {weight!r}"
        )
    if len(into):
        check_tensor("into[0]", into[0])
    pairs = [(a, g) for a, g in zip(into, grads, strict=True) if g is not None]
    if not pairs:
        check_backend(backend)
        device = into[0].device if len(into) else "cpu"
        return torch.zeros((), dtype=torch.float64, device=device) if norm else None
    into, sources = [a for a, _ in pairs], [g for _, g in pairs]
    key = (address_or_none(into[0]), len(into), backend, torch_swaps())
    with _looking:
        known = _known.get(key)
        addresses = known.addresses(into, sources) if known is not None else None
        if known is not None and addresses is not None:
            table = known.table
        else:
            given = sources
            if not _uniform(into, given):
                sources = [_check_pair(place, *pair, *pairs[0]) for place, pair in enumerate(pairs)]
            addresses = [address(f"grads[{place}]", grad) for place, grad in enumerate(sources)]
            table = _table(into, backend, known)
            checked = _CheckedLists(into, sources, table)
            if all(map(is_, sources, given)):  # not where one had to be copied
                _remember(key, checked)
        record = table.record(addresses, AccumulateOptions(float(weight)))
    squares = _kernels.accumulate_(table, record, sources[0].dtype)
    torch.autograd.graph.increment_version(into)
    return squares.sum(dtype=torch.float64).sqrt() if norm else None


def _table(into: list[Tensor], backend: str | None, known: _CheckedLists | None) -> TensorTable:
    device = into[0].device
    triton = uses_triton("into", device, backend)
    placed = [(address(f"into[{place}]", a), a.numel()) for place, a in enumerate(into)]
    rows = [TensorRow(at, numel=numel) for at, numel in placed]
    if known is not None and known.table.rows == rows and known.table.triton == triton:
        return known.table  # only the gradients are elsewhere
    check_disjoint("into", into)
    return TensorTable(rows, device, triton)


def _remember(key: Key, lists: _CheckedLists) -> None:
    replaced = _known.pop(key, None)
    forgotten = [] if replaced is None else [replaced]
    _known[key] = lists
    if len(_known) > _MAX_KNOWN:
        forgotten.append(_known.popitem(last=False)[1])
    _captured_tables.extend(
        old.table for old in forgotten if old.table.captured and old.table is not lists.table
    )


def _uniform(into: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether all is as it mostly is: contiguous, of equal shapes, one dtype. Cheaply found out."""
    tensors = (*into, *grads)
    if not all(isinstance(tensor, Tensor) and tensor.layout is torch.strided for tensor in tensors):
        return False
    device, dtype = into[0].device, grads[0].dtype
    return (
        dtype in DTYPES
        and all(tensor.dtype is torch.float32 for tensor in into)
        and all(tensor.dtype is dtype for tensor in grads)
        and all(tensor.device == device for tensor in tensors)
        and list(map(Tensor.size, into)) == list(map(Tensor.size, grads))
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def _check_pair(
    place: int, into: Tensor, grad: Tensor, first_into: Tensor, first_grad: Tensor
) -> Tensor:
    """The gradient, in the accumulator's layout; both like the first pair."""
    for name, tensor in (("into", into), ("grads", grad)):
        check_plain(f"{name}[{place}]", check_tensor(f"{name}[{place}]", tensor))
        check_memory(f"{name}[{place}]", tensor)
    device, dtype = first_into.device, first_grad.dtype
    if into.dtype is not torch.float32 or not is_dense(into):
        raise TypeError(
            f"into[{place}]: expected a dense float32 tensor, got {into.dtype} with strides "
            f"{into.stride()}"
        )
    if grad.dtype is not dtype or dtype not in DTYPES:
        raise TypeError(
            f"grads[{place}]: expected one dtype for all, float64, float32, float16 or bfloat16, "
            f"got {grad.dtype}"
        )
    if into.device != device or grad.device != device or grad.shape != into.shape:
        raise ValueError(
            f"grads[{place}]: expected shape {tuple(into.shape)} on {device}, got "
            f"{tuple(grad.shape)} on {grad.device} for an accumulator on {into.device}"
        )
    return grad if same_layout(grad, into) else torch.empty_like(into, dtype=dtype).copy_(grad)
