# SPDX-License-Identifier: Apache-2.0
"""Causal attention of short sequences, by Triton's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MOST_PROGRAMS = 128  # with as many as a GPU runs at once; with more torch's kernels are faster
_WIDEST = 64  # columns of a head; likewise
_BLOCK = 64  # rows of a program


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these: q (1, H, T, D), k and v (1, K, T, D), H a multiple of K."""
    return (
        q.ndim == 4
        and len(q) == len(k) == len(v) == 1
        and q.shape[2:] == k.shape[2:] == v.shape[2:]
        and k.shape[1] == v.shape[1]
        and q.shape[1] % k.shape[1] == 0
        and q.shape[1] * -(-q.shape[2] // _BLOCK) <= _MOST_PROGRAMS
        and q.shape[3] <= _WIDEST
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, half: torch.dtype) -> Tensor:
    """softmax(scale * q k^T) v under a causal mask, (1, H, T, D) in `half`.

    Products take their inputs rounded to `half`; sums and the softmax are in float32.
    """
    result: Tensor = _Attention.apply(q, k, v, scale, half)  # type: ignore[no-untyped-call]
    return result


def _by_rows(q: Tensor, dtype: torch.dtype, *heads: int) -> Tensor:
    """Memory for (T, *heads, D), in which a row of all heads lies together."""
    return q.new_empty(q.shape[2], *heads, q.shape[3], dtype=dtype)


def _constants(q: Tensor, half: torch.dtype) -> dict[str, Any]:
    wide = max(16, 1 << (q.shape[3] - 1).bit_length())
    kind = half if q.is_cuda else torch.float32  # the interpreter multiplies no bfloat16
    return {"HALF": kind, "BLOCK": _BLOCK, "D": wide}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in (t.stride(1), t.stride(2)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, half: torch.dtype
    ) -> Tensor:
        from ..triton_kernels.launch import launch

        _, heads, length, width = q.shape
        out = _by_rows(q, half, heads).transpose(0, 1)[None]
        normalisers = q.new_empty(heads, length, dtype=torch.float32)
        group = heads // k.shape[1]
        sizes = (length, width, scale, group, *_strides(q, k, v, out))
        with torch.cuda.device_of(q):
            grid = (-(-length // _BLOCK), heads)
            launch("attention", grid, (q, k, v, out, normalisers, *sizes), _constants(q, half))
        ctx.save_for_backward(q, k, v, out, normalisers)
        ctx.scale, ctx.half = scale, half
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from ..triton_kernels.launch import launch

        q, k, v, out, normalisers = ctx.saved_tensors
        d = d if d.stride(3) == 1 else d.contiguous()
        _, heads, length, width = q.shape
        shared = k.shape[1]
        group = heads // shared
        dq = _by_rows(q, q.dtype, heads).transpose(0, 1)[None]
        # With groups every head of q has its own part, in float32.
        together = q.new_empty(2 * (group > 1), length, shared, group, width, dtype=torch.float32)
        parts = together.unbind() or [_by_rows(q, t.dtype, shared, group) for t in (k, v)]
        sizes = (length, width, ctx.scale, group, *_strides(q, k, v, out, d, dq))
        with torch.cuda.device_of(q):
            grid = (2 * -(-length // _BLOCK), heads)
            launch(
                "attention_gradient",
                grid,
                (q, k, v, out, d, normalisers, dq, *parts, *sizes),
                _constants(q, ctx.half),
            )
        sums = together.sum(3).unbind() if group > 1 else [part[:, :, 0] for part in parts]
        dk, dv = (
            part.to(like.dtype).transpose(0, 1)[None]
            for part, like in zip(sums, (k, v), strict=True)
        )
        return dq, dk, dv, None, None
