# SPDX-License-Identifier: Apache-2.0
"""Rotary positions by a Triton kernel, in place of a model's own function."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .one_backward import OneBackward
from .replaced_globals import Replacement
from .trials import plain_modes, random_tensor

NAME = "apply_rotary_pos_emb"  # of the function in a model's module, for q, k, cos and sin
_WIDEST = 256  # columns of a head


class Rotation:
    """The tables of a call of `rotary`, and the gradients of q and k that a reader has made.

    Attention reads both results. It can compute the gradients of what was rotated as it makes those
    of the results, and leaves them here instead of giving autograd any. A backward pass of the
    whole graph takes them. What one of a part of the graph has left is forgotten.

    dtype: of q and k before the rotation, and of these gradients.
    """

    def __init__(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> None:
        self.cos, self.sin, self.dtype = cos, sin, dtype
        self._left: tuple[Tensor, Tensor] | None = None
        self._backward = OneBackward()

    def leave(self, d_q: Tensor, d_k: Tensor) -> None:
        """Gradients of q and k before the rotation. Nobody else has them: autograd gets them."""
        before = self.take()
        self._left = (d_q, d_k) if before is None else (before[0] + d_q, before[1] + d_k)

    def take(self) -> tuple[Tensor, Tensor] | None:
        left, self._left = self._left, None
        return None if self._backward.is_another() else left


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.rotation = rotation
        dtype = torch.promote_types(q.dtype, cos.dtype)
        results = _launch(q, k, cos, sin, dtype, backward=False)
        ctx.shapes, ctx.dtype = [x.shape for x in results], dtype
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        cos, sin = ctx.saved_tensors
        if all(d is None for d in gradients):
            left = ctx.rotation.take()
            return *((None, None) if left is None else left), None, None, None
        whole = [
            torch.zeros(shape, dtype=ctx.dtype, device=cos.device) if d is None else d
            for d, shape in zip(gradients, ctx.shapes, strict=True)
        ]
        d_q, d_k = (d if d.stride(3) == 1 else d.contiguous() for d in whole)
        ctx.rotation.leave(*_launch(d_q, d_k, cos, sin, ctx.rotation.dtype, backward=True))
        return *ctx.rotation.take(), None, None, None


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, backward: bool
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.launch import launch
    from ..triton_kernels.rotary import PAIRS

    texts, heads, length, width = q.shape
    programs, strides, results = 0, [], []
    for x in (q, k):
        out = x.new_empty(texts, length, x.shape[1], width, dtype=dtype).transpose(1, 2)
        results.append(out)
        strides += [*x.stride()[:3], *out.stride()[:3]]
        programs += -(-x.shape[1] * length // PAIRS)
    half = width // 2
    constants = {"BACKWARD": backward, "HALF": max(8, 1 << (half - 1).bit_length())}
    sizes = (heads, k.shape[1], length, half, *strides, *table_strides(cos))
    with torch.cuda.device_of(q):
        launch("rotary", (programs, texts), (q, k, cos, sin, *results, *sizes), constants)
    return results[0], results[1]


def table_strides(table: Tensor) -> tuple[int, int]:
    """From text to text, which may all have one, and from row to row."""
    return table.stride(0) if len(table) > 1 else 0, table.stride(1)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[tuple[Tensor, Tensor], Rotation]:
    """x * cos + rotate_half(x) * sin of q (K, H, T, D) and of k (K, G, T, D), of one dtype.

    cos and sin: (K, T, D), or (1, T, D) for all texts, without gradients.

    The second result is for a function that reads both of the first.
    """
    rotation = Rotation(cos, sin, q.dtype)
    results: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin, rotation)  # type: ignore[no-untyped-call]
    return results, rotation


def takes(x: Tensor, cos: Any, sin: Any) -> bool:
    return (
        isinstance(cos, Tensor)
        and isinstance(sin, Tensor)
        and x.ndim == 4
        and x.shape[3] % 2 == 0
        and x.shape[3] <= _WIDEST
        and x.stride(3) == 1
        and cos.shape == sin.shape
        and cos.shape in ((1, *x.shape[2:]), (len(x), *x.shape[2:]))
        and cos.stride() == sin.stride()
        and cos.stride(2) == 1
        and cos.dtype is sin.dtype
        and not cos.requires_grad
        and not sin.requires_grad
    )


# What a function was found to compute, by dtypes and width of its arguments and the globals that it
# names, which somebody may replace.
_proven: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()


def _is_rotary(own: Callable[..., Any], q: Tensor, cos: Tensor) -> bool:
    """Whether `own` computes what the kernel does. It is tried once, outside of captures."""
    known = _proven.setdefault(own, {})
    key = (q.dtype, cos.dtype, q.shape[3], q.device.type, _named_globals(own))
    if key not in known:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        generator = torch.Generator(device="cpu").manual_seed(0)
        width = q.shape[3]
        queries, keys = random_tensor(generator, 2, 2, 3, 5, width).to(q.device, q.dtype)
        tables = random_tensor(generator, 2, 2, 5, width).to(q.device, cos.dtype)
        directions = random_tensor(generator, 2, 2, 3, 5, width).to(q.device)
        with plain_modes():
            try:
                leaves = [queries.detach().requires_grad_(), keys.detach().requires_grad_()]
                wanted = own(*leaves, *tables)
                found, _ = rotary(*leaves, *tables)
                given = [direction.to(found[0].dtype) for direction in directions]
                pairs = [
                    *zip(wanted, found, strict=True),
                    *zip(
                        torch.autograd.grad(wanted, leaves, given),
                        torch.autograd.grad(found, leaves, given),
                        strict=True,
                    ),
                ]
                known[key] = all(
                    a.dtype is b.dtype and a.shape == b.shape and _close(a, b) for a, b in pairs
                )
            except Exception:
                known[key] = False
    return known[key]


def _named_globals(function: Callable[..., Any]) -> tuple[FunctionType, ...]:
    """The functions behind the names of globals in its code, and in code within it."""
    space = getattr(function, "__globals__", {})
    waiting, found = [getattr(function, "__code__", None)], []
    for code in waiting:
        found += [space.get(name) for name in getattr(code, "co_names", ())]
        waiting += [one for one in getattr(code, "co_consts", ()) if isinstance(one, CodeType)]
    return tuple(value for value in found if isinstance(value, FunctionType))


def _close(a: Tensor, b: Tensor) -> bool:
    # Two products and a sum of numbers up to about 16, each rounded once.
    return bool(((a.double() - b.double()).abs() <= 32.0 * torch.finfo(a.dtype).eps).all())


def replacements(
    model: nn.Module,
    ready: Callable[[Tensor], bool],
    note: Callable[[Tensor, Tensor, Rotation], None],
    names: set[str],
) -> list[Replacement]:
    """The kernel for the function of that name, in the modules of the model's classes.

    ready: whether a tensor may go to the kernel. note: is told of both results. names: gets the
    names of what was replaced.
    """

    def stand_in(own: Any, *args: Any, **options: Any) -> Any:
        if len(args) == 4 and not options and all(map(ready, args[:2])):
            q, k, cos, sin = args
            known = takes(q, cos, sin) and takes(k, cos, sin) and len(q) == len(k)
            alike = q.dtype is k.dtype and q.device == k.device
            if known and alike and _is_rotary(own, q, cos):
                names.add(f"{getattr(own, '__module__', '')}.{NAME}")
                results, rotation = rotary(q, k, cos, sin)
                note(*results, rotation)
                return results
        return own(*args, **options)

    spaces: dict[int, dict[str, Any]] = {}
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        function = inspect.unwrap(kind.forward)
        code, space = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        if code is not None and NAME in code.co_names and NAME in space:
            spaces[id(space)] = space
    return [Replacement(space, NAME, stand_in) for space in spaces.values()]
