# SPDX-License-Identifier: Apache-2.0
"""act(gate) * up of a gated layer, and its gradients."""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel

BLOCK_SIZE = 1024


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # of x itself it could overflow
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """The activation of x and its derivative."""
    if KIND == "silu":
        s = _sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        s, rest = _sigmoid(2.0 * inner), _sigmoid(-2.0 * inner)  # (1 + tanh) / 2, and 1 - s
        slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * x * x)
        return x * s, s + 2.0 * x * s * rest * slope
    else:
        t = tl.erf(x * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + x * density


@triton.jit
def gate_kernel(gate, up, out, size, KIND: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """out = act(gate) * up; act(gate) is rounded to the gate's dtype first, as in the model."""
    after_previous_kernel(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0)
    value, _ = _activation(g.to(tl.float32), KIND)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    product = value.to(g.dtype).to(tl.float32) * u
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradient_kernel(
    gate, up, gradient, gate_gradient, up_gradient, size, KIND: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0)
    value, slope = _activation(g.to(tl.float32), KIND)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    to_gate = (d * u * slope).to(gate_gradient.dtype.element_ty)
    to_up = (d * value.to(g.dtype).to(tl.float32)).to(up_gradient.dtype.element_ty)
    tl.store(gate_gradient + at, to_gate, mask=inside)
    tl.store(up_gradient + at, to_up, mask=inside)
