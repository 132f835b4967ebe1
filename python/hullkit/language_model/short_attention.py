# SPDX-License-Identifier: Apache-2.0
"""Causal attention of short sequences, by Triton's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rotary import Rotation, table_strides

_BLOCK = 64  # rows of a program
_WIDEST = 64  # columns of a head
# Kernels were found to be faster than torch's in two cases (H100). Few heads: a GPU runs all
# programs for rows of q at once, at most _FEW_PROGRAMS. Many heads: there are at least
# _MANY_PROGRAMS programs for rows of k, and a text has at most _LONGEST tokens. So the bits of a
# text may depend on how many share its pass.
_FEW_PROGRAMS, _MANY_PROGRAMS, _LONGEST = 128, 160, 512
_MOST_HEADS = 65535  # of all texts: they are the second axis of a grid


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these: q (K, H, T, D), k and v (K, G, T, D), H a multiple of G."""
    return (
        q.ndim == 4
        and len(q) == len(k) == len(v)
        and q.shape[2:] == k.shape[2:] == v.shape[2:]
        and k.shape[1] == v.shape[1]
        and q.shape[1] % k.shape[1] == 0
        and (_programs(q) <= _FEW_PROGRAMS or (_has_many(k) and q.shape[2] <= _LONGEST))
        and q.shape[3] <= _WIDEST
        and len(q) * q.shape[1] <= _MOST_HEADS
        and _has_rows(q)
        and _has_rows(k)
        and _has_rows(v)
    )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, half: torch.dtype,
    rotation: Rotation | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale * q k^T) v under a causal mask, (K, H, T, D) in `half`.

    Products take their inputs rounded to `half`; sums and the softmax are in float32.

    scale: above 0, so that the highest of scaled scores is that of scores.
    rotation: q and k are the two results of a call of `rotary`, which gave this too. It may be left
        the gradients of what was rotated, with the bits that `rotary` would give them.
    """
    result: Tensor = _Attention.apply(q, k, v, scale, half, rotation)  # type: ignore[no-untyped-call]
    return result


def _has_rows(heads: Tensor) -> bool:
    """Whether elements of a row are neighbours, and a head's rows at most 2^31 elements apart."""
    return heads.stride(3) == 1 and heads.shape[2] * heads.stride(2) < 1 << 31


def _programs(heads: Tensor) -> int:
    """A program for each block of rows of each head."""
    return len(heads) * heads.shape[1] * -(-heads.shape[2] // _BLOCK)


def _has_many(k: Tensor) -> bool:
    return _programs(k) >= _MANY_PROGRAMS


def _by_rows(q: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """(K, heads, T, D), in whose memory a row of all heads lies together."""
    return q.new_empty(len(q), q.shape[2], heads, q.shape[3], dtype=dtype).transpose(1, 2)


def _constants(q: Tensor, half: torch.dtype) -> dict[str, Any]:
    wide = max(16, 1 << (q.shape[3] - 1).bit_length())
    kind = half if q.is_cuda else torch.float32  # the interpreter multiplies no bfloat16
    return {"HALF": kind, "BLOCK": _BLOCK, "WIDTH": q.shape[3], "D": wide}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in t.stride()[:3])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, half: torch.dtype,
        rotation: Rotation | None,
    ) -> Tensor:  # fmt: skip
        from ..triton_kernels.launch import launch

        texts, heads, length, _ = q.shape
        out = _by_rows(q, half, heads)
        normalisers = q.new_empty(texts, heads, length, dtype=torch.float32)
        sizes = (heads, length, scale, heads // k.shape[1], *_strides(q, k, v, out))
        with torch.cuda.device_of(q):
            grid = (-(-length // _BLOCK), texts * heads)
            launch("attention", grid, (q, k, v, out, normalisers, *sizes), _constants(q, half))
        ctx.save_for_backward(q, k, v, out, normalisers)
        ctx.scale, ctx.half, ctx.rotation = scale, half, rotation
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        # Autograd would not know that a gradient that was left cannot be differentiated again.
        return _backward(ctx, d, None if torch.is_grad_enabled() else ctx.rotation)


@once_differentiable
def _backward(
    ctx: Any, d: Tensor, rotation: Rotation | None
) -> tuple[Tensor | None, Tensor | None, Tensor, None, None, None]:
    q, k, v, out, normalisers = ctx.saved_tensors
    d = d if _has_rows(d) else d.contiguous()
    constants = _constants(q, ctx.half)
    many = _has_many(k)
    if not (many and all(ctx.needs_input_grad[:2]) and constants["WIDTH"] == constants["D"]):
        rotation = None
    with torch.cuda.device_of(q):
        of_heads = partial(_of_many_heads, rotation) if many else _of_few_heads
        dq, dk, dv = of_heads(q, k, v, out, normalisers, d, ctx.scale, constants)
    if rotation is None:
        return dq, dk, dv, None, None, None
    rotation.leave(dq, dk)
    return None, None, dv, None, None, None


def _of_few_heads(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalisers: Tensor, d: Tensor, scale: float,
    constants: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ..triton_kernels.launch import launch

    texts, heads, length, width = q.shape
    shared = k.shape[1]
    group = heads // shared
    dq = _by_rows(q, q.dtype, heads)
    # With groups every head of q has its own part, in float32.
    if group == 1:
        parts = [_by_rows(q, t.dtype, heads) for t in (k, v)]
    else:
        together = q.new_empty(2, texts, length, heads, width, dtype=torch.float32)
        parts = list(together.unbind())
    sizes = (heads, length, scale, group, *_strides(q, k, v, out, d, dq))
    grid = (2 * -(-length // _BLOCK), texts * heads)
    arguments = (q, k, v, out, d, normalisers, dq, *parts, *sizes)
    launch("attention_gradient", grid, arguments, constants)
    if group > 1:
        sums = together.unflatten(3, (shared, group)).sum(4).transpose(2, 3)
        parts = [part.to(like.dtype) for part, like in zip(sums, (k, v), strict=True)]
    return dq, parts[0], parts[1]


def _of_many_heads(
    rotation: Rotation | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalisers: Tensor,
    d: Tensor, scale: float, constants: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With a rotation the first two are the gradients of what it rotated."""
    from ..triton_kernels.launch import launch

    texts, heads, length, _ = q.shape
    shared = k.shape[1]
    blocks = -(-length // _BLOCK)
    dq, dk = (
        _by_rows(t, t.dtype if rotation is None else rotation.dtype, t.shape[1]) for t in (q, k)
    )
    dv = _by_rows(v, v.dtype, shared)
    tables, table = (q, q), (0, 0)
    if rotation is not None:
        tables, table = (rotation.cos, rotation.sin), table_strides(rotation.cos)
    along = torch.empty_like(normalisers)
    sizes = (heads, length, scale, heads // shared)
    arguments = (q, k, v, out, d, normalisers, along, dq, *tables, *sizes)
    strides = (*_strides(q, k, v, out, d, dq), *table)
    constants = {"ROTATED": rotation is not None} | constants
    launch("attention_q_gradient", (blocks, texts * heads), (*arguments, *strides), constants)
    sizes = (shared, length, scale, heads // shared)
    arguments = (q, k, v, d, normalisers, along, dk, dv, *tables, *sizes)
    strides = (*_strides(q, k, v, d, dk, dv), *table)
    launch("attention_kv_gradient", (blocks, texts * shared), (*arguments, *strides), constants)
    return dq, dk, dv
