# SPDX-License-Identifier: Apache-2.0
"""Sums of a residual, and the norms that read them, by one kernel.

Which norm reads a sum shows when it does. So a pass notes it, and the next one computes it together
with the sum. A sum is known by the norm that read its first part: a model's layers alternate.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .norms import Norm, Normed, normed
from .recent_tensors import RecentTensors


class NormCall(NamedTuple):
    """A norm's arguments, apart from its input. narrow: whether y is wanted in bfloat16 too."""

    weight: Tensor
    bias: Tensor | None
    formula: Norm
    dtype: torch.dtype
    narrow: bool

    def state(self) -> list[tuple[int, int]]:
        """Other numbers once somebody has changed the weight or the bias."""
        tensors = (self.weight, self.bias)
        return [(t.data_ptr(), t._version) for t in tensors if t is not None]


class _Follower(NamedTuple):
    """A `NormCall` that keeps no tensor alive."""

    weight: weakref.ref[Tensor]
    bias: weakref.ref[Tensor] | None
    formula: Norm
    dtype: torch.dtype
    narrow: bool


# By the weight of the norm before: what read the sum in the latest pass. No pass relies on it.
_FOLLOWERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Ahead(NamedTuple):
    call: NormCall
    state: list[tuple[int, int]]
    normed: list[Normed]  # empty once a norm has got it


class ResidualNorms:
    """The sums of one pass."""

    def __init__(self) -> None:
        self._sums: RecentTensors[Tensor] = RecentTensors()  # the weight of the norm before
        self._ahead: RecentTensors[_Ahead] = RecentTensors()

    def add(self, x: Tensor, other: Tensor, before: Tensor) -> tuple[Tensor, _Ahead] | None:
        """x + other with what the norm needs that is expected to read it; None if none is known.

        before: the weight of the norm that read x.
        """
        call = _follower(before)
        if call is None or x.shape[-1:] != call.weight.shape or call.weight.device != x.device:
            return None
        if not (x.is_contiguous() and other.is_contiguous()):
            return None
        with torch.no_grad():
            total = torch.empty_like(x)
            made = normed(x, *call, residual=(other, total))
        return total, _Ahead(call, call.state(), [made])

    def note(self, total: Tensor, before: Tensor, ahead: _Ahead | None) -> None:
        """`total` is a residual's sum."""
        self._sums.note(total, before)
        if ahead is not None:
            self._ahead.note(total, ahead)

    def take(self, x: Tensor, call: NormCall) -> Normed | None:
        """The norm of x, if it was made with the sum; it is given away once."""
        before = self._sums.get(x)
        if before is None:
            return None
        _FOLLOWERS[before] = _Follower(
            weakref.ref(call.weight), None if call.bias is None else weakref.ref(call.bias),
            call.formula, call.dtype, call.narrow,
        )  # fmt: skip
        ahead = self._ahead.get(x)
        if ahead is None or not ahead.normed or ahead.state != call.state():
            return None
        return ahead.normed.pop() if ahead.call[2:] == call[2:] else None


def _follower(before: Tensor) -> NormCall | None:
    found: _Follower | None = _FOLLOWERS.get(before)
    if found is None:
        return None
    weight = found.weight()
    bias = None if found.bias is None else found.bias()
    if weight is None or (found.bias is not None and bias is None):
        return None
    return NormCall(weight, bias, found.formula, found.dtype, found.narrow)
