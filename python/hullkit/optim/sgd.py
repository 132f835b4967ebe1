# SPDX-License-Identifier: Apache-2.0
"""SGD with several updates for one gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _kernels
from ._buckets import Bucket
from ._fused import FusedOptimizer
from ._record import SGDOptions
from ._state import State, state_like


class SGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with `step(num_steps=k)`: k updates with one gradient in one pass.

    For each of the k updates, with the same g (negated if maximize):

        g_t = g + weight_decay * p
        b = momentum * b + (1 - dampening) * g_t   (the first update ever: b = g_t)
        p = p - lr * (g_t + momentum * b if nesterov else b)

    Equivalent to: k calls of torch.optim.SGD's `step()`; `hullkit.reference.sgd`.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        foreach, differentiable, fused, max_grad_norm, backend: as in :class:`Adam`.

    Numerics and errors as in :class:`Adam`. State: `momentum_buffer`, only with momentum.
    Memory traffic: 5 words for each parameter, 3 without momentum, whatever k is.

    >>> import hullkit, torch
    >>> p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    >>> hullkit.optim.SGD([p], lr=0.1).step(num_steps=3)
    >>> p.data
    tensor([0.7000, 0.7000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize
        )
        self._init_fused(
            max_grad_norm=max_grad_norm, backend=backend, foreach=foreach, fused=fused,
            differentiable=differentiable,
        )  # fmt: skip

    def _state_of(self, group: dict[str, Any], param: Tensor) -> State:
        if not group["momentum"]:
            return [None, None, None], False
        state = self.state[param]
        # Undamped, a buffer of zeros takes the first gradient as it is.
        fresh = state.get("momentum_buffer") is None and group["dampening"] != 0
        return [state_like(state, "momentum_buffer", param, param.dtype), None, None], fresh

    def _variant(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"])

    def _options(self, group: dict[str, Any], lr: float) -> SGDOptions:
        momentum = float(group["momentum"])
        undamped = 1.0 - float(group["dampening"]) if momentum else 1.0
        return SGDOptions(
            lr=lr,
            momentum=momentum,
            undamped=undamped,
            l2=float(group["weight_decay"]),
            nesterov=float(group["nesterov"]),
            sign=-1.0 if group["maximize"] else 1.0,
        )

    def _kernel(self, bucket: Bucket, record: Tensor, num_steps: int) -> None:
        _kernels.sgd_(bucket.table, record, bucket.dtypes, num_steps)
