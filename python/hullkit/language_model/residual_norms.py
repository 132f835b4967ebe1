# SPDX-License-Identifier: Apache-2.0
"""Sums of a residual, and the norms that read them, by one kernel.

Which norm reads a sum shows when it does. So a pass notes it under the norm that read the residual
last, and the next pass makes both at once. What follows a norm is mostly the same in every pass.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .norms import Norm, Normed, normed
from .recent_tensors import RecentTensors, states


class NormCall(NamedTuple):
    """A norm's arguments, apart from its input. narrow: whether y is wanted in bfloat16 too."""

    weight: Tensor
    bias: Tensor | None
    formula: Norm
    dtype: torch.dtype
    narrow: bool


class _Follower(NamedTuple):
    """A `NormCall` that keeps no tensor alive."""

    weight: weakref.ref[Tensor]
    bias: weakref.ref[Tensor] | None
    formula: Norm
    dtype: torch.dtype
    narrow: bool


# By the weight of the norm before: what read the sum in the latest pass. No pass relies on it.
_FOLLOWERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Ahead(NamedTuple):
    """A norm that was made with its input. normed is empty once somebody has taken it."""

    before: Tensor
    call: NormCall
    states: list[tuple[int, int]]
    normed: list[Normed]


class _Sum(NamedTuple):
    """before: the weight of the norm before. dtype: of what was added to its input."""

    before: Tensor
    dtype: torch.dtype


class ResidualNorms:
    """The sums of one pass."""

    def __init__(self) -> None:
        self._sums: RecentTensors[_Sum] = RecentTensors()
        self._ahead: RecentTensors[Ahead] = RecentTensors()
        self._latest: Ahead | None = None

    def add(self, x: Tensor, other: Tensor, before: Tensor) -> tuple[Tensor, Ahead] | None:
        """x + other with the norm that is expected to read it; None if none is known.

        before: the weight of the norm that read x.
        """
        unread, self._latest = self._latest, None
        if unread is not None and unread.normed:
            _FOLLOWERS.pop(unread.before, None)
        call = _follower(before)
        if call is None or not _takes(x, other, call):
            return None
        total, made = _add(x, other, call)
        self._latest = Ahead(before, call, states(call.weight, call.bias), [made])
        return total, self._latest

    def note(self, total: Tensor, before: Tensor, dtype: torch.dtype, ahead: Ahead | None) -> None:
        """`total` is the sum of the input of the norm `before` and a tensor of this dtype."""
        self._sums.note(total, _Sum(before, dtype))
        if ahead is not None:
            self._ahead.note(total, ahead)

    def take(self, x: Tensor, call: NormCall) -> Normed | None:
        """The norm of x, if it was made with the sum. It is given away once.

        Writes through `.data` are not seen, which change no version: none may come in between.
        """
        of = self._sums.get(x)
        if of is None:
            return None
        known = _follower(of.before)
        if known is None or known.weight is not call.weight or known[2:] != call[2:]:
            _FOLLOWERS[of.before] = _Follower(
                weakref.ref(call.weight), None if call.bias is None else weakref.ref(call.bias),
                call.formula, call.dtype, call.narrow,
            )  # fmt: skip
            other = torch.empty_like(x, dtype=of.dtype)
            if _takes(x, other, call):
                _add(x, other, call)  # the kernel is compiled now, and not in a capture
        ahead = self._ahead.get(x)
        if ahead is None or not ahead.normed or ahead.call[2:] != call[2:]:
            return None
        return ahead.normed.pop() if ahead.states == states(call.weight, call.bias) else None


def _follower(before: Tensor) -> NormCall | None:
    found: _Follower | None = _FOLLOWERS.get(before)
    if found is None:
        return None
    weight = found.weight()
    bias = None if found.bias is None else found.bias()
    if weight is None or (found.bias is not None and bias is None):
        return None
    return NormCall(weight, bias, found.formula, found.dtype, found.narrow)


def _takes(x: Tensor, other: Tensor, call: NormCall) -> bool:
    """Whether one kernel makes both, with the bits that it has for a norm alone."""
    rows = [call.weight] if call.bias is None else [call.weight, call.bias]
    return (
        (x.dtype is other.dtype or call.narrow)
        and x.device == other.device
        and x.is_contiguous()
        and other.is_contiguous()
        and all(
            row.is_contiguous() and row.shape == x.shape[-1:] and row.device == x.device
            for row in rows
        )
    )


def _add(x: Tensor, other: Tensor, call: NormCall) -> tuple[Tensor, Normed]:
    with torch.no_grad():
        total = torch.empty_like(x)
        return total, normed(x, *call, residual=(other, total))
