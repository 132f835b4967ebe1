# SPDX-License-Identifier: Apache-2.0
"""Arguments as other people's code passes them: arrays of any dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..selection._arrays import tensor_of, to_numpy


def floating(name: str, array: Any) -> Tensor:
    """A float32 or float64 tensor, whichever holds the array's values."""
    array = to_numpy(name, array)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.result_type(array.dtype, np.float32))
    return tensor_of(name, array)
