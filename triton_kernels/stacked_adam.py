"""k Adam updates of slots that lie side by side, each with its own number of updates.

A slot's parameters are one row [N] of a matrix. A slot without updates is neither read nor written.
"""

import triton
import triton.language as tl

from .adam import COEFFICIENTS, _moved
BLOCKS = 4  # of a program, one after the other


@triton.jit
def stacked_adam_kernel(
    params, grads, exp_avg, exp_avg_sq, copies, control, broken, size, capacity,
    unscale, beta1, rest1, beta2, rest2, COPY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """All but `copies` are float32 [K, size]. Axis 0 has chunks of a slot, axis 1 slots.

    control [K, 1 + 2 capacity] float32: the number of updates, then each update's step size and
        what is added to its root (see `adam_coefficients_kernel`).
    broken [K] int32: set to 1 where a gradient is not finite.
    """
    slot = tl.program_id(1).to(tl.int64)
    control += slot * (1 + COEFFICIENTS * capacity)
    num_steps = tl.load(control).to(tl.int32)
    if num_steps > 0:
        first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
        for block in range(BLOCKS):
            at = first + block * BLOCK + tl.arange(0, BLOCK)
            inside = at < size
            of = slot * size + at
            param = tl.load(params + of, mask=inside, other=0.0)
            grad = tl.load(grads + of, mask=inside, other=0.0) * unscale
            mean = tl.load(exp_avg + of, mask=inside, other=0.0)
            square = tl.load(exp_avg_sq + of, mask=inside, other=0.0)
            for i in range(num_steps):
                param, mean, square = _moved(
                    param, mean, square, grad, 0.0, 1.0, control + 1 + i * COEFFICIENTS,
                    beta1, rest1, beta2, rest2, tl.float32, tl.float32,
                )  # fmt: skip
            tl.store(params + of, param, mask=inside)
            tl.store(exp_avg + of, mean, mask=inside)
            tl.store(exp_avg_sq + of, square, mask=inside)
            if COPY:
                tl.store(copies + of, param.to(copies.dtype.element_ty), mask=inside)
            lost = inside & ~(tl.abs(grad) < float("inf"))
            tl.store(broken + slot + tl.zeros_like(at), 1, mask=lost)
