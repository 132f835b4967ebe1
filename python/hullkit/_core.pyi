# SPDX-License-Identifier: Apache-2.0
# The compiled module; private.
from collections.abc import Callable
from typing import Any, final

__version__: str

# Every selection operation by name, as csrc/bindings/operations.cpp declares it.
operations: dict[str, Operation]

# The numbers that cross for a dtype of torch, a hullkit.Status and a variant of frank_wolfe.
dtypes: dict[str, int]
statuses: dict[str, int]
variants: dict[str, int]

def name_dtypes(codes: dict[Any, int], /) -> None: ...  # {torch.float64: code}, once

# Names of the fields of what optimizer kernels read, in order.
layouts: dict[str, tuple[str, ...]]

@final
class Operation:
    def __init__(self) -> None: ...  # TypeError: only the core makes them
    schema: str  # of its operator
    arguments: tuple[str, ...]  # their names, in the order of the schema
    cpu: Callable[..., None]  # (*arguments, num_threads)
    cuda: Callable[..., None] | None  # (*arguments, allocate, stream); None without CUDA

def build_info() -> dict[str, Any]: ...
def usable_exchange(capsule: Any, /) -> bool: ...

# See optim/_layouts.py, which has the same in Python.
class Layouts:
    def __init__(
        self, exchange: Any, is_neg: Any, tensors: list[Any], hold: bool, swappable: bool, /
    ) -> None: ...
    def unmoved(self, tensors: list[Any], same_objects: bool, /) -> bool: ...
    def addresses(self, tensors: list[Any], of_gradients: bool, /) -> list[int] | None: ...
    def overlapped_by(self, others: Layouts, /) -> int: ...

class StateLayouts:
    def __init__(self, exchange: Any, state: dict[Any, dict[str, Any]], /) -> None: ...
    def unmoved(self, state: dict[Any, dict[str, Any]], /) -> bool: ...

def uninterrupted(work: Callable[[], Any], /) -> Any: ...

class WithBlock:
    def __init__(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *exc_info: object) -> None: ...

# A table of rows and a record, by address: optim/_record.py. dtypes are codes.
def adam_cpu(
    *,
    rows: int,
    count: int,
    record: int,
    param_dtype: int,
    grad_dtype: int,
    state_dtype: int,
    num_steps: int,
    stochastic_rounding: bool,
    num_threads: int,
) -> None: ...
def sgd_cpu(
    *,
    rows: int,
    count: int,
    record: int,
    param_dtype: int,
    grad_dtype: int,
    state_dtype: int,
    num_steps: int,
    num_threads: int,
) -> None: ...
def accumulate_cpu(
    *, rows: int, count: int, record: int, grad_dtype: int, num_threads: int
) -> float: ...
def squared_norm_cpu(
    *, rows: int, count: int, record: int, grad_dtype: int, num_threads: int
) -> float: ...

most_product_results: int
most_product_gradients: int
most_product_terms: int
product_tile_columns: int
product_tile_rows: tuple[int, ...]

def product_sums_usable() -> bool: ...  # on the current device

# The other numbers of 64 bits are addresses.
def product_sums_cuda(
    *,
    matrices: int,
    num_results: int,
    num_terms: int,
    transposed: bool,
    num_gradients: int,
    wide_gradients: bool,
    stream: int,
) -> None: ...

adam_product_tile: int

def adam_product_usable() -> bool: ...  # on the current device

# Only in builds with CUDA.
def adam_product_cuda(
    *,
    rows: int,
    factors: int,
    record: int,
    chunks: int,
    coefficients: int,
    copies: int,
    programs: int,
    capacity: int,
    param_dtype: int,
    stochastic_rounding: bool,
    stream: int,
) -> None: ...

class DictCopies:
    def __init__(self, dicts: list[dict[Any, Any]]) -> None: ...
    def changed(self) -> list[tuple[dict[Any, Any], dict[Any, Any]]]: ...
    def values(
        self, types: set[type] | frozenset[type], keys: set[str] | frozenset[str]
    ) -> list[Any]: ...
