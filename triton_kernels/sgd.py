# SPDX-License-Identifier: Apache-2.0
"""k SGD updates with one gradient: each element is read once, updated k times, written once.

Options are SGDOptions in `record`.
"""

import triton
import triton.language as tl

from ..optim._record import SGDOptions
from .dependent_launch import after_previous_kernel
from .multi_tensor import (
    FLAGS,
    PARAM_AT,
    STATE1_AT,
    gradient,
    locate,
    option,
    place,
    read,
    updates,
    whole_blocks,
    write,
)

LR = place(SGDOptions, "lr")
MOMENTUM = place(SGDOptions, "momentum")
UNDAMPED = place(SGDOptions, "undamped")
L2 = place(SGDOptions, "l2")
NESTEROV = place(SGDOptions, "nesterov")
SIGN = place(SGDOptions, "sign")
FACTOR = place(SGDOptions, "factor")


@triton.jit
def _update(
    param_at, grad_at, buffer_at, offsets, end, record, num_steps, fresh,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MATH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    param = read(param_at, offsets, end, PARAM, MATH, WHOLE)
    grad = read(grad_at, offsets, end, GRAD, MATH, WHOLE)
    buffer = tl.zeros_like(param)
    if (buffer_at != 0) & (fresh == 0):
        buffer = read(buffer_at, offsets, end, STATE, MATH, WHOLE)
    lr = option(record, LR).to(MATH)
    momentum = option(record, MOMENTUM).to(MATH)
    undamped = option(record, UNDAMPED).to(MATH)
    l2 = option(record, L2).to(MATH)
    nesterov = option(record, NESTEROV) != 0
    grad *= (option(record, SIGN) * option(record, FACTOR)).to(MATH)
    for i in range(updates(record, num_steps)):
        # Fused where written so, as in adam.py.
        total = grad
        if l2 != 0:  # an infinite parameter times 0 would be NaN
            total = tl.fma(param, l2, grad)
        # A fresh buffer takes the gradient undamped. `0 * fresh` makes a tensor of i: Triton 3.2's
        # interpreter has no `&` of a tensor and False.
        share = tl.where((fresh != 0) & (i + 0 * fresh == 0), 1.0, undamped).to(MATH)
        buffer = tl.fma(total, share, buffer * momentum)
        ahead = tl.where(nesterov, tl.fma(buffer, momentum, total), buffer)
        param = tl.fma(ahead, -lr, param)
    if buffer_at != 0:
        write(buffer_at, offsets, end, buffer, STATE, WHOLE)
    write(param_at, offsets, end, param, PARAM, WHOLE)


@triton.jit(do_not_specialize=["num_steps"])
def sgd_kernel(
    table, record, chunks, num_steps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MATH: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    after_previous_kernel(EARLY)
    row, entry, start, end = locate(table, chunks, CHUNK)
    param_at = tl.load(entry + PARAM_AT)
    buffer_at = tl.load(entry + STATE1_AT)  # 0 without momentum; momentum and dampening are then 0
    fresh = tl.load(entry + FLAGS) & 1
    grad_at = gradient(record, row)
    whole = whole_blocks(param_at | buffer_at | grad_at, start, end, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    for _ in range(whole):
        _update(
            param_at, grad_at, buffer_at, offsets, end, record, num_steps, fresh,
            PARAM, GRAD, STATE, MATH, WHOLE=True,
        )  # fmt: skip
        offsets += BLOCK
    for _ in range(whole, tl.cdiv(end - start, BLOCK)):
        _update(
            param_at, grad_at, buffer_at, offsets, end, record, num_steps, fresh,
            PARAM, GRAD, STATE, MATH, WHOLE=False,
        )  # fmt: skip
        offsets += BLOCK
