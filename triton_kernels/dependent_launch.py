# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel is put on the GPU while the one before it still runs.

Passes are long rows of short kernels. Without it each is launched only when the last program of the
one before it has ended. GPUs of compute capability 9.0 and later can do it.
"""

import torch
import triton
import triton.language as tl

from ..optim._triton_launch import MOST_EARLY

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4
    gdc_launch_dependents = gdc_wait = None

_CAPABILITY = (9, 0)


@triton.jit
def after_previous_kernel(EARLY: tl.constexpr):
    """The first statement of every kernel: what the kernels before it wrote can be read after it.

    EARLY: whether the kernel was launched so that it may begin before they have ended.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


def starts_early(kernel: object, programs: int) -> bool:
    """Whether a kernel of so many programs may begin early on the current device.

    Triton's interpreter knows no such launch.
    """
    if gdc_wait is None or not isinstance(kernel, triton.JITFunction) or torch.version.cuda is None:
        return False
    return programs <= MOST_EARLY and torch.cuda.get_device_capability() >= _CAPABILITY
