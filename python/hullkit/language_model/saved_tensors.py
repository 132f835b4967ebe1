# SPDX-License-Identifier: Apache-2.0
"""The tensors that a pass saves for its backward half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..native.torch_private import StorageWatch, watch_storage

Function = Callable[[Tensor], Tensor]
Packed = Tensor | Callable[[], Tensor]


class Saved:
    """Keeps saved tensors, except outputs of `cheap` functions.

    The backward pass computes such an output again from the input, which the function itself saves
    anyway. It has the same bits. These outputs are a quarter of the memory of a pass of GPT-2.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, tuple[StorageWatch, int, Function, Tensor]] = {}

    def cheap(self, function: Function, x: Tensor) -> Tensor:
        """function(x), whose output is computed again when it is needed.

        The function is elementwise and saves x for its gradient.
        """
        y = function(x)
        if y.dtype is x.dtype and y.is_contiguous():  # else autocast has changed the dtype
            storage = y.untyped_storage()
            known = (watch_storage(storage), y._version, function, x.detach())
            self._outputs[storage.data_ptr()] = known
        return y

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        # Saved tensors keep the second function alive: it must not refer to this object.
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Packed:
        tensor = tensor.detach()  # a node and its own output would keep each other alive
        known = self._outputs.get(tensor.untyped_storage().data_ptr())
        if known is not None:
            storage, version, function, x = known
            # By now the address may belong to another tensor, or the output may have changed.
            if not storage.expired() and tensor._version == version:
                geometry = (tensor.shape, tensor.stride(), tensor.storage_offset())
                return _Again(function, x, geometry)
        return self.keep(tensor)

    def keep(self, tensor: Tensor) -> Packed:
        """The object that is kept for a tensor: itself, or a function that returns one like it."""
        return _Again(torch.Tensor.detach, tensor, None)


def _unpack(packed: Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


class _Again:
    """function(x), after a check that x is unchanged, which autograd omits where hooks are."""

    def __init__(self, function: Function, x: Tensor, geometry: tuple[Any, ...] | None) -> None:
        self._function, self._x, self._geometry = function, x, geometry
        self._version = x._version

    def __call__(self) -> Tensor:
        if self._x._version != self._version:
            raise RuntimeError(
                "a tensor needed for the gradient was modified by an inplace operation"
            )
        y = self._function(self._x)
        return y if self._geometry is None else y.as_strided(*self._geometry)
