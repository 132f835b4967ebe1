# SPDX-License-Identifier: Apache-2.0
"""Sums of two tensors, each float32 or a half, element by element."""

import triton
import triton.language as tl

from .dependent_launch import after_previous_kernel

BLOCK_SIZE = 1024


@triton.jit
def add_kernel(
    first, second, out, size, MORE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """out = first + second in float32, rounded to out's dtype; with MORE out's value is added."""
    after_previous_kernel(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    if MORE:
        total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
