# SPDX-License-Identifier: Apache-2.0
"""Products whose gradients are added up where they are used, and linear layers made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._tensors import HALVES, uses_triton
from .one_backward import OneBackward
from .recent_tensors import RecentTensors, has_hooks

# Whether torch multiplies halves into float32.
_PRODUCTS_WIDEN = hasattr(torch.ops.aten.mm, "dtype_out")
_BATCHES_WIDEN = hasattr(torch.ops.aten.bmm, "dtype_out")
# cuBLAS's fastest tiles (H100), and where two halves of a long sum side by side save more than
# adding them up costs.
_TILE_ROWS, _TILE_COLUMNS = 224, 128
_LONG, _LARGE = 3, 1 << 25


def widens(tensor: Tensor) -> bool:
    """Whether torch multiplies halves like this tensor straight into float32."""
    return tensor.is_cuda and _PRODUCTS_WIDEN


def add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a @ b; with `fresh`, total = a @ b."""
    if _pays_to_split(a, b):
        _add_split_product(total, a, b, fresh)
    elif total.dtype is a.dtype:
        total.addmm_(a, b, beta=int(not fresh))
    elif not widens(a):
        product = torch.mm(a, b)
        total.copy_(product) if fresh else total.add_(product)
    elif fresh:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _pays_to_split(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b is a long sum for each element of a small result on a GPU.

    Its tiles would keep less than half of the GPU busy, and cuBLAS then takes slower, small ones.
    """
    rows, length = a.shape
    columns = b.shape[1]
    if not (a.is_cuda and _BATCHES_WIDEN and a.dtype in HALVES):
        return False
    if a.stride(1) != 1 or length % 128 or length < _LONG * columns or length * columns < _LARGE:
        return False
    tiles = -(-rows // _TILE_ROWS) * -(-columns // _TILE_COLUMNS)
    processors: int = torch.cuda.get_device_properties(a.device).multi_processor_count
    return 2 * tiles <= processors


def _add_split_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """`add_product` by two products side by side, in float32, each of half of the sum."""
    halves = a.unflatten(1, (2, -1)).transpose(0, 1), b.unflatten(0, (2, -1))
    with torch.autocast(a.device.type, enabled=False):
        first, second = torch.bmm(*halves, out_dtype=torch.float32)
    add_into(total, first, second, fresh)


def add_into(
    total: Tensor, first: Tensor, second: Tensor, fresh: bool, backend: str | None = None
) -> None:
    """total += first + second; with `fresh`, total = first + second. In float32, one rounding.

    Tensors of one shape, each float32 or a half, contiguous.
    backend: "triton" takes CPU tensors too, in Triton's interpreter.
    """
    if not uses_triton("total", total.device, backend):
        wide = first.float() + second.float()
        total.copy_(wide if fresh else wide + total.float())
        return
    from ..triton_kernels.add import BLOCK_SIZE
    from ..triton_kernels.launch import launch

    size = total.numel()
    with torch.cuda.device_of(total):
        programs = -(-size // BLOCK_SIZE)
        launch("add", programs, (first, second, total, size), {"MORE": not fresh})


class SharedInput:
    """The gradient of a tensor that several functions read, which they add up.

    Autograd would make a gradient for every linear layer that reads it, cast each to the tensor's
    dtype and add them one by one. Here every layer adds its product in place. A backward pass of
    the whole graph takes it. What one of a part of the graph has left is nobody's, and forgotten.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._gradient: Tensor | None = None
        self._deferred: list[Any] = []
        self._finish: Finish | None = None
        self._backward = OneBackward()

    def _follow(self) -> None:
        if self._backward.is_another():
            self._gradient, self._deferred, self._finish = None, [], None

    def defer(self, part: Any, finish: Finish, most: int) -> None:
        """Before the gradient is taken, `finish` gets this object and all parts, and adds to it.

        So layers work at once where each would read and write the gradient for itself. It gets
        `most` of them as soon as there are so many.
        finish: the same function for all parts. It holds no reference to this object, which would
            live on with a pass's tensors if the pass fails.
        """
        self._follow()
        self._deferred.append(part)
        self._finish = finish
        if len(self._deferred) == most:
            self._finish_deferred()

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds a @ b to the gradient."""
        total, fresh = self.total(len(a), b.shape[1], a.device)
        add_product(total, a, b, fresh)

    def total(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, bool]:
        """The gradient so far, for a caller who adds to it, and whether it has no value yet."""
        self._follow()
        fresh = self._gradient is None
        if self._gradient is None:
            self._gradient = torch.empty(rows, columns, dtype=self.dtype, device=device)
        return self._gradient, fresh

    def put(self, gradient: Tensor) -> None:
        """Adds a whole gradient. `add` writes to it, so it must not follow where others have it."""
        left = self.take()
        self._gradient = gradient if left is None else left + gradient

    def _finish_deferred(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            parts, self._deferred = self._deferred, []
            finish(self, parts)

    def take(self) -> Tensor | None:
        self._follow()
        self._finish_deferred()
        gradient, self._gradient = self._gradient, None
        return gradient


Finish = Callable[[SharedInput, list[Any]], None]


def share(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, SharedInput]:
    """x in `dtype` for functions that leave its gradient in the second result."""
    shared = SharedInput(x.dtype)
    tensor: Tensor = _Enter.apply(x, shared, dtype)  # type: ignore[no-untyped-call]
    return tensor, shared


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedInput, dtype: torch.dtype) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.shape = shared, x.shape
        return x.view_as(x) if x.dtype is dtype else x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, None, None]:
        taken = ctx.shared.take()  # nobody gives autograd a gradient of the result
        return (None if taken is None else taken.view(ctx.shape)), None, None


class SharedInputs:
    """The inputs of a pass's linear layers: layers that read the same tensor share its gradient."""

    def __init__(self) -> None:
        self._known: RecentTensors[tuple[Tensor, SharedInput]] = RecentTensors()

    def of(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, SharedInput]:
        """x in the products' dtype, and where all layers that read it leave its gradient."""
        base = x._base
        whole = (
            base is not None
            and base.numel() == x.numel()
            and (base.is_contiguous() and x.is_contiguous())
            and _is_view(x, base)
        )
        learns = torch.is_grad_enabled() and x.requires_grad
        for known in () if has_hooks(x) else (x, base) if whole else (x,):
            entry = None if known is None or has_hooks(known) else self._known.get(known)
            if entry is not None and entry[0].dtype is dtype:
                tensor, shared = entry
                if tensor.grad_fn is not None or not learns:  # else made where gradients are off
                    return tensor if known is x else tensor.view(x.shape), shared
        made = share(x, dtype)
        self.note(x, *made)
        return made

    def note(self, x: Tensor, tensor: Tensor, shared: SharedInput) -> None:
        """`tensor` is x for linear layers, which leave its gradient in `shared`."""
        self._known.note(x, (tensor, shared))


_VIEWS = {f"{name}Backward0" for name in ("View", "Unsqueeze", "Squeeze", "ReshapeAlias")}
_VIEWS |= {"SqueezeBackward1", "SqueezeBackward2"}


def _is_view(x: Tensor, base: Tensor) -> bool:
    """Whether the gradient of x is its base's, in another shape. A view may also come of somebody's
    function, which changes the gradient, or be made where gradients are off."""
    node: Any = x.grad_fn
    if node is None:
        return not base.requires_grad
    while type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    # A leaf's gradient is accumulated by a node that knows it.
    return (
        node is base.grad_fn
        if base.grad_fn is not None
        else getattr(node, "variable", None) is base
    )


class WeightProducts:
    """Told of the products that weights' gradients are, in a backward pass; takes gradients."""

    def take(self, weight: Tensor, a: Tensor, b: Tensor) -> bool:
        """Whether somebody else will use a^T b; then there is no gradient. Nobody may write to a
        and b until the pass ends."""
        return False

    def take_gradient(self, factor: Tensor, gradient: Tensor) -> bool:
        """Whether somebody else reads an adapter's gradient when the pass has ended.

        Then autograd gets none. It is written at any time until then, and nobody updates the factor
        before.
        """
        return False

    def made(self, weight: Tensor, a: Tensor, b: Tensor, gradient: Tensor) -> None:
        """`gradient`, which autograd gets now, is a^T b."""


def linear(
    x: Tensor,
    shared: SharedInput,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    products: WeightProducts | None = None,
) -> Tensor:
    """x @ weight^T + bias; with `transposed` x @ weight + bias.

    x: the tensor that `share` returned with `shared`, or a view of it, (..., D).
    products: is told of the gradient of a weight that autograd did not compute.
    """
    if not (weight.is_leaf and weight.requires_grad):
        products = None
    result: Tensor = _Linear.apply(x, weight, bias, shared, transposed, products)  # type: ignore[no-untyped-call]
    return result


def product(x: Tensor, rows: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """rows @ factor + bias in the shape of x, without autograd. It is no view: models write to it.

    rows (N, D): x's, in x's dtype. factor (D, E).
    """
    y = rows.new_empty(*x.shape[:-1], factor.shape[1])
    flat = y.view(-1, factor.shape[1])
    if bias is None and _pays_to_split(rows, factor):
        _add_split_product(flat, rows, factor, fresh=True)
    elif bias is None:
        torch.mm(rows, factor, out=flat)
    else:
        torch.addmm(bias.to(rows.dtype), rows, factor, out=flat)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shared: SharedInput,
        transposed: bool,
        products: WeightProducts | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        # The weight as the caller knows it, if that is to be told of its product.
        ctx.products, ctx.known = products, None if products is None else weight
        # A weight that is not trained needs no input for its gradient.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shared, ctx.transposed = shared, transposed
        ctx.bias = None if bias is None else bias.dtype
        rows = x.reshape(-1, x.shape[-1])
        factor = weight.to(x.dtype)
        return product(x, rows, factor if transposed else factor.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None
    ) -> tuple[None, Tensor | None, Tensor | None, None, None, None]:
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        if gradient is None:
            return None, None, None, None, None, None
        x, weight = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        kind = g.device.type
        d_weight = None
        with torch.autocast(kind, enabled=False):
            if of_x:
                factor = weight.to(g.dtype)
                ctx.shared.add(g, factor.t() if ctx.transposed else factor)
            if of_weight:
                rows = x.reshape(-1, x.shape[-1])
                a, b = (rows, g) if ctx.transposed else (g, rows)
                if ctx.products is None or not ctx.products.take(ctx.known, a, b):
                    d_weight = g.new_empty(weight.shape, dtype=weight.dtype)
                    add_product(d_weight, a.t(), b, fresh=True)
                    if ctx.products is not None:
                        ctx.products.made(ctx.known, a, b, d_weight)
        return None, d_weight, column_sums(g, ctx.bias) if of_bias else None, None, None, None


def column_sums(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values.sum(0) in float32, rounded to `dtype`. values [T, D], or [N, T, D] for N matrices."""
    if not uses_triton("values", values.device, None):
        return values.sum(-2, dtype=torch.float32).to(dtype)
    from ..triton_kernels.launch import launch
    from ..triton_kernels.norm import SUM_COLUMNS

    values = values if values.stride(-1) == 1 else values.contiguous()
    rows, columns = values.shape[-2:]
    sums = values.new_empty(*values.shape[:-2], columns, dtype=dtype)
    with torch.cuda.device_of(values):
        grid = (-(-columns // SUM_COLUMNS), values.shape[0] if values.ndim == 3 else 1)
        launch("column_sums", grid, (values, sums, rows, columns, values.stride(-2)), {})
    return sums
