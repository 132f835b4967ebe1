# SPDX-License-Identifier: Apache-2.0
"""Where tensors lie: the one place that takes addresses, and whether all is as it was.

The optimizers keep tables of addresses. Between two calls a user may replace any tensor, or give it
other memory, strides, shape or dtype in place. So tables are used again only after every tensor has
been looked at: by DLPack's C functions where torch offers them, in Python where it does not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .._checks import bytes_reached, has_memory
from ..native import kernels
from ..native.torch_private import dlpack_exchange


def _is_plain(kind: type) -> bool:
    """Whether this is a class of tensors that leaves it to torch what operations do."""
    return issubclass(kind, Tensor) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def check_plain(name: str, tensor: Tensor) -> None:
    """Kernels read and write memory. A class with a `__torch_dispatch__` of its own (DTensor,
    FakeTensor, quantised wrappers) says itself what an update is, and may have no memory."""
    kind = type(tensor)
    if _is_plain(kind):
        return
    message = f"{name}: expected a tensor with memory of its own, got a {kind.__name__}"
    if kind.__name__ == "DTensor":
        message += "; update the shard of this rank, .to_local(), or use torch.optim"
    raise TypeError(message)


def address(name: str, tensor: Tensor) -> int:
    """The address of the first element. It is 0 only for a tensor without elements."""
    check_plain(name, tensor)
    if tensor.is_neg():
        raise ValueError(f"{name}: expected a tensor without negative bit; call .resolve_neg()")
    found = address_or_none(tensor)
    if found is None:
        raise TypeError(
            f"{name}: expected a tensor with memory of its own, got a {type(tensor).__name__} of "
            f"shape {tuple(tensor.shape)} without"
        )
    check_memory(name, tensor)
    return found


def check_memory(name: str, tensor: Tensor) -> None:
    """Refuses elements behind the end of the storage, where kernels would find others'."""
    if address_or_none(tensor) is not None and not has_memory(tensor):
        raise ValueError(
            f"{name}: expected a storage of at least {bytes_reached(tensor)} bytes, "
            f"got {tensor.untyped_storage().nbytes()}"
        )


class Layouts(Protocol):
    """Class, address, dtype, device, shape and strides of each of some tensors."""

    def unmoved(self, tensors: list[Tensor], same_objects: bool, /) -> bool:
        """Whether all is as it was; same_objects: and these are the very tensors."""

    def addresses(self, tensors: list[Tensor], of_gradients: bool, /) -> list[int] | None:
        """Where these tensors (of_gradients: their `.grad`) lie, if all else is as it was.

        The same list as last time if they have not moved.
        """

    def overlapped_by(self, others: Any, /) -> int:
        """The place of one of the others that shares memory with one of these, but for one that is
        the same at the same place; -1: none does. All are dense; these share none among them."""


class StateLayouts(Protocol):
    """The same of the tensors in an optimizer's state."""

    def unmoved(self, state: dict[Any, dict[str, Any]], /) -> bool: ...


# Whether modules' conversions and loads swap tensors. What was looked at before is then of no use:
# torch swaps none that somebody else holds or refers to weakly.
torch_swaps: Callable[[], bool] = torch.__future__.get_swap_module_params_on_conversion

_exchange: Any = dlpack_exchange()
if _exchange is not None and not kernels.usable_exchange(_exchange):
    _exchange = None


def layouts(tensors: list[Tensor], *, hold: bool = False) -> Layouts:
    """The layouts of tensors that have an address. hold: keep the tensors alive, which makes
    looking at them faster. Where torch swaps tensors, nothing is held or referred to."""
    if _exchange is None:
        return _PlainLayouts(tensors)
    return kernels.Layouts(_exchange, Tensor.is_neg, tensors, hold, torch_swaps())


def state_layouts(state: dict[Any, dict[str, Any]]) -> StateLayouts:
    if _exchange is None:
        return _PlainStateLayouts(state)
    return kernels.StateLayouts(_exchange, state)


def _layout(value: Any) -> tuple[Any, ...]:
    """All but the address; of anything but a plain tensor the class alone."""
    kind = type(value)
    if not _is_plain(kind):
        return (kind,)
    strides = value.stride() if value.layout is torch.strided else value.layout
    return (kind, value.dtype, value.device, value.shape, strides, value.is_neg())


def address_or_none(value: Any) -> int | None:
    """The address of a value; None if it is no tensor, or a tensor without memory."""
    if not _is_plain(type(value)):
        return None
    try:
        found: int = value.data_ptr()
    except RuntimeError:  # torch's wrappers for tracing and for functional transformations
        return None
    return found if found or not value.numel() else None


def whereabouts(value: Any) -> tuple[Any, ...]:
    """What `Layouts` compares, of one value."""
    return (*_layout(value), address_or_none(value))


class _PlainLayouts:
    def __init__(self, tensors: list[Tensor]) -> None:
        self._layouts = list(map(_layout, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._objects = list(map(id, tensors))
        self._bytes = [tensor.nbytes for tensor in tensors]
        self._element_sizes = list(map(Tensor.element_size, tensors))

    def unmoved(self, tensors: list[Tensor], same_objects: bool) -> bool:
        return (
            (not same_objects or list(map(id, tensors)) == self._objects)
            and list(map(_layout, tensors)) == self._layouts
            and list(map(address_or_none, tensors)) == self._addresses
        )

    def addresses(self, tensors: list[Tensor], of_gradients: bool) -> list[int] | None:
        values: list[Any] = [t.grad for t in tensors] if of_gradients else tensors
        if list(map(_layout, values)) != self._layouts:
            return None
        addresses: list[Any] = list(map(address_or_none, values))
        if None in addresses:
            return None
        known = self._addresses  # a signal's handler may look meanwhile, at tensors of its own
        if addresses == known:
            return known
        self._addresses = addresses
        return addresses

    def _stretches(self) -> list[tuple[int, int]]:
        return [(at, at + n) for at, n in zip(self._addresses, self._bytes, strict=True)]

    def overlapped_by(self, others: _PlainLayouts) -> int:
        own = self._stretches()
        ordered = sorted(stretch for stretch in own if stretch[0] < stretch[1])
        for place, (begin, end) in enumerate(others._stretches()):
            before = bisect_left(ordered, (end, 0)) - 1  # the last that begins before the end
            if begin == end or before < 0 or ordered[before][1] <= begin:
                continue
            same = own[place : place + 1] == [(begin, end)]
            if not same or self._element_sizes[place] != others._element_sizes[place]:
                return place
        return -1


class _PlainStateLayouts:
    def __init__(self, state: dict[Any, dict[str, Any]]) -> None:
        self._found = self._look(state)

    def unmoved(self, state: dict[Any, dict[str, Any]]) -> bool:
        return self._look(state) == self._found

    @staticmethod
    def _look(state: dict[Any, Any]) -> list[Any]:
        return [
            (id(param), name, _layout(value), address_or_none(value) or id(value))
            for param, own in state.items()
            # Users keep notes of their own there.
            for name, value in (own.items() if isinstance(own, dict) else [(None, own)])
        ]
