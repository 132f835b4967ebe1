"""Parameters sorted into buckets, one for each launch of a fused optimizer's step."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._multi_tensor import DTYPES, TensorTable

Params = list[Tensor]


class Bucket:
    """Parameters that one launch updates: same group, same device, same dtypes."""

    def __init__(
        self, params: Params, grad_dtype: torch.dtype, table: TensorTable, fresh: bool
    ) -> None:
        self.params = params
        self.dtypes = (params[0].dtype, grad_dtype, params[0].dtype)  # parameter, gradient, state
        self.table = table
        self.fresh = fresh  # whether state is set by the first launch, not read
        self.shapes = list(map(Tensor.size, params))
        self.strides = list(map(Tensor.stride, params))

    def fits(self, grads: list[Tensor]) -> bool:
        """Whether all gradients are as most are: of one dtype and laid out as their parameters."""
        dtype, device = self.dtypes[1], self.table.device
        return (
            all(g.layout is torch.strided and g.dtype is dtype for g in grads)
            and all(g.device == device for g in grads)
            and list(map(Tensor.size, grads)) == self.shapes
            and list(map(Tensor.stride, grads)) == self.strides
        )


class Launch(NamedTuple):
    """One pass to be made."""

    group: dict[str, Any]
    bucket: Bucket
    addresses: list[int]  # of the gradients
    kept: list[Tensor]  # gradients nobody else may hold


class Sorted:
    """Buckets of some parameters, and what must be as it was for them to hold."""

    def __init__(self, params: Params, buckets: list[Bucket], places: list[list[int]]) -> None:
        self.params = params
        self.addresses = list(map(Tensor.data_ptr, params))
        self.buckets = buckets
        self.places = places  # of each bucket's parameters in params
        self.grads: list[int] = []  # where the latest gradients lay, if none was copied
        self.launches: list[Launch] = []  # with those

    def unmoved(self, params: Params) -> bool:
        """Whether these are the parameters, and they and their gradients lie where they lay."""
        if len(params) != len(self.grads) or not all(map(is_, self.params, params)):
            return False
        try:
            grads = [param.grad.data_ptr() for param in params]  # type: ignore[union-attr]
        except (AttributeError, RuntimeError):  # None; sparse, without an address
            return False
        return grads == self.grads and list(map(Tensor.data_ptr, params)) == self.addresses


def check_grad(param: Tensor, grad: Tensor) -> None:
    name = f"grad of a parameter of shape {tuple(param.shape)}"
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
