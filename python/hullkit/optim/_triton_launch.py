# SPDX-License-Identifier: Apache-2.0
"""Launching a kernel that Triton has compiled, past Triton's own way to a launch.

That way works out anew, every time, what the kernel was compiled for, and asks the driver about
every pointer: it takes longer than all the rest of a step takes on the host.

Private to Triton are `run`, `function` and `packed_metadata` of a compiled kernel, and the order of
the launcher's arguments. Checked on Triton 3.6 (CUDA), and against the source of 3.3 and 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..native.torch_private import raw_stream

Launcher = Callable[[int, tuple[Any, ...]], None]
_OLDEST = (3, 3)  # older launchers take no constants among their arguments
# Kernels of more programs are not launched so that they begin early (`dependent_launch.py`): every
# program waits for itself, which costs kernels of many short ones more than it saves. A kernel
# with a program for each row of a text of 400 tokens still begins early.
MOST_EARLY = 512


def launcher(compiled: Any, constants: tuple[Any, ...], device: torch.device) -> Launcher | None:
    """launch(programs, arguments) of a compiled kernel; None if it cannot be launched this way.

    compiled: None from Triton's interpreter, which compiles nothing. constants: the values of the
    kernel's last arguments.
    """
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        return None
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        return None

    def launch(programs: int, arguments: tuple[Any, ...]) -> None:
        words = [word.data_ptr() if isinstance(word, Tensor) else word for word in arguments]
        run(
            programs, 1, 1, raw_stream(device), function, metadata,
            None, None, None, *words, *constants,
        )  # fmt: skip

    return launch
