"""What a pass saves for its backward half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Function = Callable[[Tensor], Tensor]
Packed = Tensor | Callable[[], Tensor]


class Saved:
    """Saved tensors, but for outputs of `cheap` functions: the backward pass computes them again
    from the input, which the function itself saves anyway. The same bits; a quarter of what a pass
    of GPT-2 holds.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, tuple[StorageWeakRef, int, Function, Tensor]] = {}

    def cheap(self, function: Function, x: Tensor) -> Tensor:
        """function(x): elementwise, saving x for its gradient."""
        y = function(x)
        if y.dtype is x.dtype and y.is_contiguous():  # autocast does not decide
            storage = y.untyped_storage()
            known = (StorageWeakRef(storage), y._version, function, x.detach())
            self._outputs[storage.data_ptr()] = known
        return y

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        # Saved tensors keep the second function, which must not keep what this object does.
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Packed:
        tensor = tensor.detach()  # what a node itself returned refers to it: it would not be freed
        known = self._outputs.get(tensor.untyped_storage().data_ptr())
        if known is not None:
            storage, version, function, x = known
            # An address may have been given away again; the output may have been written to.
            if not storage.expired() and tensor._version == version:
                geometry = (tensor.shape, tensor.stride(), tensor.storage_offset())
                return _Again(function, x, geometry)
        return self.keep(tensor)

    def keep(self, tensor: Tensor) -> Packed:
        """What is kept of a tensor: what returns one like it, or nothing but itself."""
        return _Again(torch.Tensor.detach, tensor, None)


def _unpack(packed: Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


class _Again:
    """function(x), while x is what it was: with hooks autograd itself does not look."""

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
