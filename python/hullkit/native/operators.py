# SPDX-License-Identifier: Apache-2.0
"""Every operator of hullkit: schema, CPU and CUDA implementation, fake.

The core declares what an operator takes (csrc/bindings/operations.cpp): its schema is read from
there, and the records that selections pass are compared with it as they are imported. To read one:
`print(hullkit.native.operators.frank_wolfe._schema)`.

All are out-variants without a return value: the caller allocates, so buffers can be reused, a fake
has nothing to get wrong, and `torch.compile(fullgraph=True)` sees only mutated arguments.
Arguments are batched or unbatched, as in the public functions, which check them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library

from . import kernels

_LIBRARY = library.Library("hullkit", "DEF")


def _operator(name: str) -> Callable[..., None]:
    _LIBRARY.define(kernels.schema(name))
    _LIBRARY.impl(name, kernels.cpu_kernel(name), "CPU")
    _LIBRARY.impl(name, kernels.cuda_kernel(name), "CUDA")
    library.register_fake(f"hullkit::{name}", _fake(name), lib=_LIBRARY)
    overload: Callable[..., None] = getattr(torch.ops.hullkit, name).default
    return overload


def _fake(name: str) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        """Outputs are arguments: there is nothing to shape. But one on the meta device brings a
        call here whose inputs have values."""
        kernels.check_devices(name, *arguments)

    return run


lmo = _operator("lmo")
knn = _operator("knn")
duplicates = _operator("duplicates")
frank_wolfe = _operator("frank_wolfe")
select = _operator("select")
sift = _operator("sift")
round_multiplicities = _operator("round_multiplicities")
apportion = _operator("apportion")


def check_arguments(operation: str, *parts: Any) -> None:
    """Raises ImportError unless `parts` name the operation's arguments in their order.

    parts: classes of named tuples, passed as `*record`, and names of single arguments.
    """
    given = [
        name for part in parts for name in ((part,) if isinstance(part, str) else part._fields)
    ]
    expected = [*kernels.argument_names(operation)]
    if given != expected:
        raise ImportError(f"hullkit.{operation}: expected arguments {expected}, got {given}")
