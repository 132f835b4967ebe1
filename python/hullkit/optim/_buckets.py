# SPDX-License-Identifier: Apache-2.0
"""Parameters sorted into buckets, one for each launch of a fused optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tensors import DTYPES, is_dense, same_layout, uses_triton
from ._layouts import Layouts, address, check_memory, check_plain, layouts, whereabouts
from ._record import StepOptions
from ._state import StateBefore
from ._tensor_table import TensorTable, check_disjoint

Params = list[Tensor]


class Bucket:
    """Parameters that one launch updates: same group, same device, same dtypes.

    dtypes: of parameter, gradient and state.
    """

    def __init__(
        self,
        params: Params,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        table: TensorTable,
        fresh: bool,
        before: StateBefore,
    ) -> None:
        self.params = params
        self.dtypes = dtypes
        self.table = table
        self.options: StepOptions | None = None  # the latest that `check_options` has passed
        self.fresh = fresh  # whether state is set by the first launch, not read
        self.before = before  # until the first launch, the state to go back to if it fails

    def launched(self) -> None:
        if self.fresh:
            self.table.set_no_longer_fresh()
            self.fresh = False
        self.before = []


class Launch(NamedTuple):
    """One pass to be made."""

    group: dict[str, Any]
    bucket: Bucket
    addresses: list[int]  # of the gradients
    kept: list[Tensor]  # gradients nobody else may hold


class SortedBuckets:
    """Buckets of some parameters, and what must be as it was for them to hold."""

    def __init__(self, params: Params, buckets: list[Bucket], places: list[list[int]]) -> None:
        self.params = params
        self.buckets = buckets
        self._layouts = layouts(params, hold=True)  # the optimizer holds them as well
        self._places = places  # of each bucket's parameters in params
        self._grads: Layouts | None = None  # as the latest ones, if the kernels could take those
        self._read: list[int] = []  # addresses of gradients, and the same for each bucket
        self._split: list[list[int]] = []

    def holds(self, params: Params) -> bool:
        """Whether these are the parameters, and they are as they were."""
        return self._layouts.unmoved(params, True)

    def is_of_only(self, ids: set[int]) -> bool:
        """Whether every parameter has one of these ids."""
        return all(id(param) in ids for param in self.params)

    def is_of_any(self, ids: set[int]) -> bool:
        return any(id(param) in ids for param in self.params)

    def launches(
        self, group: dict[str, Any], tensors: list[Tensor], of_gradients: bool = False
    ) -> list[Launch] | None:
        """With these gradients (of_gradients: those of these parameters), or None unless they are
        as the latest ones but for the address."""
        if self._grads is None:
            return None
        read = self._grads.addresses(tensors, of_gradients)
        if read is None:
            return None
        if read is not self._read:
            if self._layouts.overlapped_by(self._grads) >= 0:
                return None
            self._read = read
            self._split = [read]
            if len(self._places) > 1:
                self._split = [[read[place] for place in places] for places in self._places]
        made = zip(self.buckets, self._split, strict=True)
        return [Launch(group, bucket, addresses, []) for bucket, addresses in made]

    def first_launches(self, group: dict[str, Any], grads: list[Tensor]) -> list[Launch] | None:
        """With gradients not seen before: checked, and copied where they are laid out otherwise
        than their parameters. None if one is of another dtype than its bucket."""
        launches, used = [], list(grads)
        for bucket, places in zip(self.buckets, self._places, strict=True):
            addresses: list[int] = []
            kept: list[Tensor] = []
            for param, place in zip(bucket.params, places, strict=True):
                grad = grads[place]
                check_grad(param, grad)
                if grad.dtype != bucket.dtypes[1]:
                    return None
                if not same_layout(grad, param):
                    used[place] = grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
                    kept.append(grad)
                addresses.append(address(_grad_name(param), grad))
            launches.append(Launch(group, bucket, addresses, kept))
        looked = layouts(used)
        place = self._layouts.overlapped_by(looked)
        if place >= 0:
            raise ValueError(
                f"{_grad_name(self.params[place])}: expected memory that no parameter has, got "
                "memory that one has; call .clone()"
            )
        self._grads = None if any(launch.kept for launch in launches) else looked
        self._read = []
        return launches


class CheckedParams:
    """All parameters of an optimizer as they were when `check_params` passed them.

    They are checked together. One step, or one block of updates in backward, that sorts one group
    or parameter after the other would otherwise check all of them for each.
    """

    def __init__(self, params: Params, salt_of: Callable[[int, Tensor], int]) -> None:
        self.salts = {id(param): salt_of(place, param) for place, param in enumerate(params)}
        self._seen = {id(param): whereabouts(param) for param in params}

    def holds(self, params: Params) -> bool:
        """Whether these are some of them, and they are as they were."""
        return all(self._seen.get(id(param)) == whereabouts(param) for param in params)


def params_of(groups: list[dict[str, Any]]) -> Params:
    """Every parameter once, in the order of the groups."""
    return list({id(p): p for group in groups for p in group["params"]}.values())


def check_params(groups: list[dict[str, Any]], backend: str | None) -> None:
    params = params_of(groups)
    for param in params:
        name = f"params: parameter of shape {tuple(param.shape)}"
        if param.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected dtype float64, float32, float16 or bfloat16, got {param.dtype}"
            )
        if param.layout is not torch.strided or not is_dense(param):
            got = f"strides {param.stride()}" if param.layout is torch.strided else param.layout
            raise ValueError(f"{name}: expected elements side by side in memory, got {got}")
        uses_triton("params", param.device, backend)
    if len(params) < sum(len(group["params"]) for group in groups):
        raise ValueError("params: expected every parameter once, got one twice")
    check_disjoint("params", params)


def check_options(group: dict[str, Any]) -> None:
    """Refuses NaN, and betas outside [0, 1), if a group has them now.

    The rest that the constructor refuses, such as a negative lr, torch.optim takes from a group.
    """
    for name in ("lr", "eps", "weight_decay", "momentum", "dampening"):
        value = group.get(name, 0.0)
        on_device = isinstance(value, Tensor) and value.device.type != "cpu"  # reading would wait
        if not on_device and math.isnan(value):
            raise ValueError(f"{name}: expected a number, got {value!r} in a parameter group")
    betas = group.get("betas", ())
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas: expected numbers in [0, 1), got {betas} in a parameter group")


def _grad_name(param: Tensor) -> str:
    return f"grad of a parameter of shape {tuple(param.shape)}"


def check_grad(param: Tensor, grad: Tensor) -> None:
    name = _grad_name(param)
    check_plain(name, grad)
    if grad.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense gradient, got {grad.layout}; pass sparse=False to the "
            "embedding that made it"
        )
    if grad.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected dtype float64, float32, float16 or bfloat16, got {grad.dtype}"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"{name}: expected that shape on {param.device}, got {tuple(grad.shape)} on "
            f"{grad.device}"
        )
    check_memory(name, grad)


def check_mapping(grads: Any) -> None:
    if not isinstance(grads, Mapping):
        got = type(grads).__name__
        raise TypeError(f"grads: expected a mapping from parameters to gradients, got {got}")


def check_keys(grads: Iterable[Any], params: Params) -> None:
    """Raises ValueError for a key of `grads` that is no parameter."""
    known = set(params)
    for got in grads:
        if got not in known:
            kind = f"one of shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(f"grads: expected gradients of the optimizer's parameters, got {kind}")
