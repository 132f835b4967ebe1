# SPDX-License-Identifier: Apache-2.0
"""The sum of a layer's input and its output, whose gradient is both parts'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .products import SharedInput, add_into


class NarrowGradient:
    """The gradient of a sum in the dtype of its narrower part.

    A norm that reads the sum last makes both at once; else the sum casts.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._made: tuple[Tensor, int, Tensor] | None = None

    def put(self, gradient: Tensor, narrow: Tensor) -> None:
        """`narrow` is the gradient in `dtype`, as it is now. No copy is made of either."""
        self._made = gradient, gradient._version, narrow

    def take(self, gradient: Tensor) -> Tensor:
        """The gradient in `dtype`: what was put if that was this gradient, unchanged since."""
        made, self._made = self._made, None
        if made is not None:
            # The object may be another one. Memory of a tensor that is kept is nobody else's.
            wide, version, narrow = made
            one = (gradient.data_ptr(), gradient.shape, gradient.stride(), gradient._version)
            if one == (wide.data_ptr(), wide.shape, wide.stride(), version):
                return narrow
        return gradient.to(self.dtype)


def add_residual(
    x: Tensor,
    around: SharedInput,
    other: Tensor,
    narrowed: NarrowGradient | None,
    made: Tensor | None = None,
) -> Tensor:
    """x + other in x's dtype. The gradient of x is left in `around`, of which x came by `share`.

    narrowed: of other's dtype, if that is not x's. made: the sum, if somebody has it; it becomes
    the result.
    """
    result: Tensor = _AddResidual.apply(  # type: ignore[no-untyped-call]
        x, other, around, narrowed, None if made is None else [made]
    )  # in a list, as no input: what a function returns of those is a view
    return result


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor,
        around: SharedInput,
        narrowed: NarrowGradient | None,
        made: list[Tensor] | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.around, ctx.narrowed = around, narrowed
        if made is not None:
            return made[0]
        if narrowed is None or not (x.is_cuda and x.is_contiguous() and other.is_contiguous()):
            return x + other
        result = torch.empty_like(x)
        add_into(result, x, other, fresh=True)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, Tensor | None, None, None, None]:
        if gradient is None:
            return None, None, None, None, None
        if ctx.needs_input_grad[0]:
            ctx.around.put(gradient)
        to_other = None
        if ctx.needs_input_grad[1]:
            to_other = gradient if ctx.narrowed is None else ctx.narrowed.take(gradient)
        return None, to_other, None, None, None
