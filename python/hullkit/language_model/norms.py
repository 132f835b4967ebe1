# SPDX-License-Identifier: Apache-2.0
"""Layer norms and RMS norms by Triton's kernels, and the proof that a module is one of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .products import SharedInput, column_sums
from .residuals import NarrowGradient
from .trials import column, random_tensor, trial

WIDEST = 16384  # columns that a program holds
_MOST_PROGRAMS = 256  # of the gradient: each has a part of the weight's
_FREE_PROGRAMS = 2048  # if the weight has none
# From so many rows on a program takes some together, of so many elements: 26,624 rows of 576 take
# 0.84 of the time, and their gradients 0.91 (H100). Fewer rows keep a GPU busy only if each has a
# program. A row's bits may depend on that.
_MANY_ROWS, _TOGETHER = 4096, 4096


class Norm(NamedTuple):
    """The formula of a norm: y = n(x) * (weight + offset) + bias.

    rms: n divides by the root of the mean square alone; else it takes the mean out first.
    rounded: n(x) is rounded to x's dtype before the weight.
    """

    eps: float
    rms: bool = True
    offset: float = 0.0
    rounded: bool = False


class Normed(NamedTuple):
    """y and, if wanted, y in bfloat16, both in x's shape; what their gradient needs of rows."""

    y: Tensor
    narrow: Tensor | None
    means: Tensor
    factors: Tensor


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    formula: Norm,
    dtype: torch.dtype,
    shared: SharedInput | None = None,
    around: SharedInput | None = None,
    narrowed: NarrowGradient | None = None,
    made: Normed | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The norm of x's last dimension in `dtype`; statistics in float32.

    shared: where linear layers leave the gradient of a second result. That is the first in
        bfloat16; without `shared` it is None.
    around: x is the tensor that `share` returned with it. A residual leaves x's gradient there,
        and the norm adds its own.
    narrowed: gets x's gradient in a half too.
    made: the results, if `normed` was called before. They become this norm's.
    """
    results: tuple[Tensor, Tensor | None] = _Norm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, formula, dtype, shared, around, narrowed, made
    )
    return results


def normed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    formula: Norm,
    dtype: torch.dtype,
    narrow: bool,
    residual: tuple[Tensor, Tensor] | None = None,
) -> Normed:
    """The norm of x, without autograd.

    residual: a tensor, and memory for x + tensor in x's dtype, whose norm it then is. All three are
        contiguous.
    """
    from ..triton_kernels.launch import launch

    columns = x.shape[-1]
    rows = _rows(x)
    y = x.new_empty(x.shape, dtype=dtype)
    halved = x.new_empty(x.shape, dtype=torch.bfloat16) if narrow else None
    means, factors = x.new_empty(2, len(rows), dtype=torch.float32)
    arguments = (
        rows, *(residual or (rows, rows)), weight, weight if bias is None else bias, y,
        y if halved is None else halved, means, factors, rows.stride(0), len(rows), columns,
        formula.eps,
    )  # fmt: skip
    constants = {
        "RMS": formula.rms, "OFFSET": formula.offset, "ROUND": formula.rounded,
        "BIAS": bias is not None, "NARROW": narrow, "ADD": residual is not None,
    }  # fmt: skip
    blocks = _blocks(rows)
    with torch.cuda.device_of(x):
        launch("norm", -(-len(rows) // blocks["ROWS"]), arguments, constants | blocks)
    return Normed(y, halved, means, factors)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        formula: Norm,
        dtype: torch.dtype,
        shared: SharedInput | None,
        around: SharedInput | None,
        narrowed: NarrowGradient | None,
        made: Normed | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        if made is None:
            made = normed(x, weight, bias, formula, dtype, shared is not None)
        y, narrow, means, factors = made
        ctx.save_for_backward(x, weight, means, factors)
        ctx.formula, ctx.shared, ctx.around, ctx.narrowed = formula, shared, around, narrowed
        ctx.bias = None if bias is None else bias.dtype
        return y, narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor | None, narrow: Tensor | None) -> tuple[Any, ...]:
        from ..triton_kernels.launch import launch

        x, weight, means, factors = ctx.saved_tensors
        second = None if ctx.shared is None else ctx.shared.take()
        if narrow is not None:
            first = narrow if first is None else first + narrow
        nothing = (None,) * 9
        if first is None and second is None:
            return nothing
        columns = x.shape[-1]
        rows = _rows(x)
        left = None if ctx.around is None else ctx.around.take()
        given = [None if g is None else _rows(g).contiguous() for g in (first, second, left)]
        of_weight, of_bias = ctx.needs_input_grad[1:3]
        of_either = of_weight or of_bias
        blocks = _blocks(rows)
        most = _MOST_PROGRAMS if of_either or len(rows) < _FREE_PROGRAMS else _FREE_PROGRAMS
        programs = min(-(-len(rows) // blocks["ROWS"]), most)
        x_gradient = x.new_empty(x.shape)
        halved = None if ctx.narrowed is None else x.new_empty(x.shape, dtype=ctx.narrowed.dtype)
        partial = (
            x.new_empty(1 + of_bias, programs, columns, dtype=torch.float32)
            if of_either
            else factors
        )
        one, two, more = (factors if g is None else g for g in given)
        arguments = (
            rows, weight, one, two, more, means, factors, x_gradient,
            x_gradient if halved is None else halved, partial, rows.stride(0), len(rows), columns,
        )  # fmt: skip
        constants = {
            "RMS": ctx.formula.rms, "OFFSET": ctx.formula.offset, "FIRST": given[0] is not None,
            "SECOND": given[1] is not None, "MORE": given[2] is not None,
            "NARROW": halved is not None, "OF_WEIGHT": of_either, "BIAS": of_bias,
        } | blocks  # fmt: skip
        with torch.cuda.device_of(x):
            launch("norm_gradient", programs, arguments, constants)
        if halved is not None:
            ctx.narrowed.put(x_gradient, halved)
        to_x = x_gradient if ctx.needs_input_grad[0] else None
        if ctx.around is not None and to_x is not None:
            ctx.around.put(to_x)
            to_x = None
        if not of_either:
            return to_x, *nothing[1:]
        sums = column_sums(partial, weight.dtype)
        to_weight = sums[0] if of_weight else None
        return to_x, to_weight, sums[1].to(ctx.bias) if of_bias else None, *nothing[3:]


def _rows(x: Tensor) -> Tensor:
    """x as [T, D] with neighbouring columns."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _blocks(rows: Tensor) -> dict[str, int]:
    """The rows that a program takes together, and the columns that it has room for."""
    block = max(16, 1 << (rows.shape[1] - 1).bit_length())
    together = min(8, max(1, _TOGETHER // block))
    return {"ROWS": together if len(rows) >= _MANY_ROWS else 1, "BLOCK": block}


def proven_rms_norm(module: nn.Module, dtype: torch.dtype) -> Norm | None:
    """The formula that the module computes for inputs of this dtype; None if none is known.

    The module is run on random inputs, large ones and small ones, so that a clip, a scale or
    another eps shows. It has one weight, and eps is among its attributes.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if [*parameters] != ["weight"] or module._modules or module._buffers:
        return None
    weight = parameters["weight"]
    numbers = {v for v in vars(module).values() if type(v) is float and 0.0 < v < 0.1}
    if weight.ndim != 1 or len(weight) > WIDEST or not numbers:
        return None
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = random_tensor(generator, 1, 12, len(weight))
    sizes = column([1e-4, 3e-3, 0.1, 1.0, 1.0, 30.0] * 2)
    x = (noise * sizes + column([0.0, 0.5] * 6) * sizes).to(dtype)
    # Not the module's own, of which many functions agree while it is 0 or 1. None of them is small,
    # nor is one plus 1: their rounding would be large.
    own = random_tensor(generator, len(weight))
    own = own.sign() * (0.3 + own.abs())
    own = own.where((own + 1.0).abs() > 0.3, own - 0.6)
    weight = nn.Parameter(own.to(dtype))
    tried = trial(module, x, parameters={"weight": weight})
    if tried is None or tried.y.shape != x.shape:
        return None
    x, wanted = tried.leaves[0], tried.y.detach()
    found, least = None, math.inf
    for eps in numbers:
        for offset in (0.0, 1.0):
            for rounded in (False, True):
                formula = Norm(eps, offset=offset, rounded=rounded)
                error = _error(_rms(x.detach(), weight.detach(), formula), wanted)
                if error < least:
                    found, least = formula, error
    # Two roundings of the result, or of the normalised row; float32 rounds the statistics, too.
    # A NaN is no proof.
    eps = torch.finfo(dtype).eps
    if found is None or not least <= (8.0 if dtype is torch.float32 else 2.0) * eps:
        return None
    same = tried.has_gradients_of(_rms(x, weight, found), max(8.0 * eps, 1e-4))
    return found if same else None


def _rms(x: Tensor, weight: Tensor, formula: Norm) -> Tensor:
    wide = x.double()
    y = wide * (wide.square().mean(-1, keepdim=True) + formula.eps).rsqrt()
    if formula.rounded:
        y = y.to(x.dtype).double()
    return y * (weight.double() + formula.offset)


def _error(exact: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the element; tiny elements count as 1e-6, or as the
    dtype's least that has all digits."""
    least = max(1e-6, torch.finfo(found.dtype).tiny)
    return float(((found.double() - exact).abs() / exact.abs().clamp_min(least)).max())
