# SPDX-License-Identifier: Apache-2.0
"""What a pass knows of the tensors that it saw last."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Generic, TypeVar

from torch import Tensor

Fact = TypeVar("Fact")
_KEPT = 4  # facts: whoever asks for one follows soon


class RecentTensors(Generic[Fact]):
    """Facts about tensors. What was noted of a tensor is not known once the tensor has changed."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, tuple[weakref.ref[Tensor], int, Fact]] = OrderedDict()

    def get(self, tensor: Tensor) -> Fact | None:
        entry = self._known.get(id(tensor))  # the address may have been another tensor's
        if entry is None or entry[0]() is not tensor or entry[1] != tensor._version:
            return None
        return entry[2]

    def note(self, tensor: Tensor, fact: Fact) -> None:
        if tensor.is_inference():  # nobody counts its changes
            return
        self._known[id(tensor)] = (weakref.ref(tensor), tensor._version, fact)
        self._known.move_to_end(id(tensor))
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)


def states(*tensors: Tensor | None) -> list[tuple[int, int]]:
    """Other numbers once one of them has other memory, or somebody has written to it."""
    return [(t.data_ptr(), t._version) for t in tensors if t is not None]


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody waits for the tensor's gradient. A fused function would not compute it."""
    return bool(tensor._backward_hooks) or tensor.retains_grad
