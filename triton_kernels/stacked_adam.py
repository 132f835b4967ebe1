# SPDX-License-Identifier: Apache-2.0
"""k Adam updates of slots that lie side by side, each with its own number of updates.

A slot without updates is neither read nor written. A slot may be reset instead: its parameters
become fresh ones, its moments 0.
"""

import triton
import triton.language as tl

from .adam import COEFFICIENTS, _moved
from .dependent_launch import after_previous_kernel

BLOCKS = 4  # of a program, one after the other


@triton.jit
def stacked_adam_kernel(
    values, grads, exp_avg, exp_avg_sq, copies, fresh, control, broken, size, control_row,
    unscale, beta1, rest1, beta2, rest2, COPY: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Axis 0 has blocks of a slot's elements, axis 1 slots. Rows of `size` elements follow one
    another in memory, which is float32; `copies` may be a half.

    fresh [size]: what a slot gets that is reset.
    control [K, control_row] float32: the number of updates, -1 for a reset, then each update's step
        size and what is added to its root (see `adam_coefficients_kernel`).
    broken [K] int32: set to 1 where a gradient is not finite.
    """
    after_previous_kernel(EARLY)
    slot = tl.program_id(1).to(tl.int64)
    control += slot * control_row
    num_steps = tl.load(control).to(tl.int32)
    if num_steps != 0:
        first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
        for block in range(BLOCKS):
            at = first + block * BLOCK + tl.arange(0, BLOCK)
            inside = at < size
            of = slot * size + at
            if num_steps > 0:
                param = tl.load(values + of, mask=inside, other=0.0)
                grad = tl.load(grads + of, mask=inside, other=0.0) * unscale
                mean = tl.load(exp_avg + of, mask=inside, other=0.0)
                square = tl.load(exp_avg_sq + of, mask=inside, other=0.0)
                for i in range(num_steps):
                    param, mean, square = _moved(
                        param, mean, square, grad, 0.0, 1.0, control + 1 + i * COEFFICIENTS,
                        beta1, rest1, beta2, rest2, tl.float32, tl.float32,
                    )  # fmt: skip
                lost = inside & ((tl.abs(grad) < float("inf")) == 0)
                tl.store(broken + slot + tl.zeros_like(at), 1, mask=lost)
            else:
                param = tl.load(fresh + at, mask=inside, other=0.0)
                mean = tl.zeros_like(param)
                square = tl.zeros_like(param)
            tl.store(values + of, param, mask=inside)
            tl.store(exp_avg + of, mean, mask=inside)
            tl.store(exp_avg_sq + of, square, mask=inside)
            if COPY:
                tl.store(copies + of, param.to(copies.dtype.element_ty), mask=inside)
