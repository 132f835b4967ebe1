# SPDX-License-Identifier: Apache-2.0
"""The layout of what optimizer kernels read, in words of 8 bytes: the only one in Python.

A table is one TensorRow for each of T tensors, [T, 6] int64. A record holds what changes from
launch to launch, [HEAD + T] int64: ten options as float64 bits, a RecordControl, the addresses of T
gradients. The C++ core reads both through structs of these names; Triton's kernels read the words
whose places `triton_kernels/multi_tensor.py` takes from here.
"""

from __future__ import annotations

from typing import NamedTuple

from ..native.kernels import LAYOUTS

# The step counter in the state is float32, as torch's is: it counts up to here.
MAX_NUM_STEPS = 2**24

COEFFICIENT_ROWS = 128  # of a table, for one program of Adam's coefficients


class TensorRow(NamedTuple):
    """One tensor. Its parameter, gradient and state share one dense layout."""

    param: int  # address
    state1: int = 0  # address of Adam's exp_avg, SGD's momentum buffer; 0 for none
    state2: int = 0  # address of Adam's exp_avg_sq; 0 for none
    step: int = 0  # address of a float32 counter of updates; 0 for none
    numel: int = 0
    flags: int = 0  # bit 0: fresh, state1 is yet to be set; the rest: a salt, see flags_of


def flags_of(salt: int, fresh: bool = False) -> int:
    """salt: what tells a tensor's random numbers, of stochastic rounding, from another's."""
    return salt << 1 | fresh


class AdamOptions(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    log2_beta1: float
    log2_beta2: float
    eps: float
    l2: float = 0.0  # weight decay added to the gradient
    decay: float = 0.0  # decoupled weight decay
    sign: float = 1.0  # of the gradient: -1 to maximize
    factor: float = 1.0  # of the gradient: clipping by global norm


class SGDOptions(NamedTuple):
    lr: float
    momentum: float
    undamped: float  # 1 - dampening
    l2: float
    nesterov: float  # 0 or 1
    unused5: float = 0.0
    unused6: float = 0.0
    unused7: float = 0.0
    sign: float = 1.0
    factor: float = 1.0


class AccumulateOptions(NamedTuple):
    weight: float
    unused1: float = 0.0
    unused2: float = 0.0
    unused3: float = 0.0
    unused4: float = 0.0
    unused5: float = 0.0
    unused6: float = 0.0
    unused7: float = 0.0
    unused8: float = 0.0
    unused9: float = 0.0


class RecordControl(NamedTuple):
    limit: int  # the most updates of a launch: a captured launch has its own record for good
    broken: int  # set by Adam's kernel on a GPU at a gradient that is not finite
    seed: int  # of stochastic rounding


class ProductFactors(NamedTuple):
    """The two bfloat16 factors a [T, M] and b [T, N] of a gradient a^T b: `_products.py`."""

    a: int  # address, of 16 bytes' alignment like every row
    b: int
    a_stride: int  # elements from row to row
    b_stride: int
    tokens: int  # T
    columns: int  # N


StepOptions = AdamOptions | SGDOptions
Options = StepOptions | AccumulateOptions

for _layout in (
    TensorRow, AdamOptions, SGDOptions, AccumulateOptions, RecordControl, ProductFactors,
):  # fmt: skip
    if LAYOUTS[_layout.__name__] != _layout._fields:
        raise ImportError(
            f"{_layout.__name__}: expected the fields {LAYOUTS[_layout.__name__]} of the compiled "
            f"core, got {_layout._fields}"
        )

# Places in a record.
LR = AdamOptions._fields.index("lr")  # in SGDOptions too
FACTOR = AdamOptions._fields.index("factor")  # likewise
NUM_OPTIONS = len(AdamOptions._fields)
LIMIT, BROKEN, SEED = (
    NUM_OPTIONS + RecordControl._fields.index(name) for name in ("limit", "broken", "seed")
)
HEAD = NUM_OPTIONS + len(RecordControl._fields)  # words before the gradients' addresses

NO_LIMIT = 2**31 - 1
