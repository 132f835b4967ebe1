# SPDX-License-Identifier: Apache-2.0
"""Small tensors that a forward pass makes on the host and moves to the device.

A CUDA graph cannot record such a move: the host's memory may be gone at a replay. Here a pass
before the capture notes the values that move, and the capture reads copies of them on the device.

A constant cannot depend on the inputs. Inputs lie on the device, so the host would have to ask the
device for their values, and a capture refuses every such question by name. A value that changes
from pass to pass, like a counter's or a random one, is not among those noted and is refused, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .pass_modes import PassMode

_ATEN = torch.ops.aten
# Functions that copy tensors of the host to the device of their other arguments. Arithmetic is not
# among them: it takes a single number of the host as an argument of its kernel.
_MOVING = {
    _ATEN._to_copy.default,
    _ATEN.copy_.default,
    _ATEN.where.self,
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
}
# These move below dispatch, where no mode sees it; the latter move lists of numbers in a key.
_FROM_DATA = (torch.tensor, torch.as_tensor)
_BY_KEY = (Tensor.__getitem__, Tensor.__setitem__)

Key = tuple[torch.dtype, torch.Size, bytes]


class HostConstants:
    """The values that passes move from the host to one device, and a copy of each there.

    A graph reads the copies and does not keep them alive: this object must live as long.

    own: the model's parameters and buffers. Their values may change between two replays, so one
        that lies on the host is refused.
    """

    def __init__(self, device: torch.device, own: Iterable[Tensor] = ()) -> None:
        self._device = device
        self._copies: dict[Key, Tensor] = {}
        self._own = {t.untyped_storage().data_ptr() for t in own if t.device.type == "cpu"}

    @property
    def count(self) -> int:
        """The number of different values that were noted."""
        return len(self._copies)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside the block every value that moves to the device is noted."""
        with _Constructors(self._device), _Moves(self._device, self._note, asks=True):
            yield

    @contextmanager
    def served(self) -> Iterator[None]:
        """Inside the block values come from the copies.

        A RuntimeError is raised where a value was not noted, or where the device is asked for one.
        """
        with _Constructors(self._device), _Moves(self._device, self._serve, asks=False):
            yield

    def _note(self, value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() in self._own:
            shape = tuple(value.shape)
            raise RuntimeError(f"a parameter or buffer of shape {shape} lies on the host")
        return self._copies.setdefault(_key(value), value.detach().to(self._device))

    def _serve(self, value: Tensor) -> Tensor:
        known = self._copies.get(_key(value))
        if known is None:
            raise RuntimeError(
                "a host tensor that differs from pass to pass, of shape "
                f"{tuple(value.shape)} and {value.dtype}, moves to the device"
            )
        return known


class _Moves(TorchDispatchMode):
    """Replaces the host tensors that move to a device by what `constant` returns for each.

    asks: whether the device may be asked for values.
    """

    def __init__(
        self, device: torch.device, constant: Callable[[Tensor], Tensor], *, asks: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._constant = constant
        self._asks = asks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        involved = any(map(self._is_on_device, leaves))
        if not self._asks and involved and self._asks_device(func, args, kwargs):
            raise RuntimeError(
                f"forward asks the device for values ({func}), as `.item()`, `.cpu()` and "
                "`if tensor:` do"
            )
        if func in _MOVING and (involved or self._is_target(kwargs.get("device"))):
            if func is _ATEN.copy_.default and not self._is_on_device(args[0]):
                return func(*args, **kwargs)
            args = tree_map(self._replaced, args)
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        is_host = isinstance(value, Tensor) and value.device.type == "cpu"
        return self._constant(value) if is_host else value

    def _asks_device(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if func is _ATEN._to_copy.default:
            target = kwargs.get("device")
            return target is not None and torch.device(target).type == "cpu"
        if func is _ATEN.copy_.default:
            return not self._is_on_device(args[0])
        if func is _ATEN.index.Tensor:  # a mask: its result's size is the number of its ones
            masks = (torch.bool, torch.uint8)
            return any(index is not None and index.dtype in masks for index in args[1])
        if func is _ATEN.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        asking = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        return any(tag in func.tags for tag in asking)

    def _is_on_device(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device.type

    def _is_target(self, device: Any) -> bool:
        return device is not None and torch.device(device).type == self._device.type


class _Constructors(PassMode):
    """`torch.tensor(data, device=...)` in two steps, host and move, so that the move is seen; and
    `x[..., [1, 2]]` as `x[..., torch.tensor([1, 2])]`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _BY_KEY and args[0].device.type == self._device.type:
            x, key, *value = args
            key = tuple(map(_index, key)) if isinstance(key, tuple) else _index(key)
            return func(x, key, *value)
        kwargs = dict(kwargs)
        target = kwargs.get("device")
        data = kwargs.get("data", args[-1] if args else None)
        ours = func in _FROM_DATA or func is Tensor.new_tensor
        if func is Tensor.new_tensor:
            if target is None:
                target = args[0].device
            kwargs.setdefault("dtype", args[0].dtype)
        if (
            not ours
            or target is None
            or torch.device(target).type != self._device.type
            or kwargs.get("requires_grad")
            or any(isinstance(leaf, Tensor) for leaf in tree_leaves(data))
        ):
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(target)


def _index(part: Any) -> Any:
    """A part of a key: a list of numbers as a tensor of the host."""
    if type(part) is list and part and all(type(number) is int for number in part):
        return torch.tensor(part, device="cpu")
    return part


def _key(value: Tensor) -> Key:
    octets = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return value.dtype, value.shape, octets.numpy().tobytes()
