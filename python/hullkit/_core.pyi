# The compiled module; private. A tensor is (address, dtype code, shape, strides in elements).
from typing import Any

_View = tuple[int, int, tuple[int, ...], tuple[int, ...]] | None

__version__: str

def lmo_cpu(
    pool: _View,
    direction: _View,
    lengths: _View,
    candidates: _View,
    index: _View,
    value: _View,
    num_threads: int,
    /,
) -> None: ...
def knn_cpu(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    indices: _View,
    values: _View,
    num_threads: int,
    /,
) -> None: ...
def duplicates_cpu(
    pool: _View,
    lengths: _View,
    candidates: _View,
    eps: float,
    representatives: _View,
    num_threads: int,
    /,
) -> None: ...
def frank_wolfe_cpu(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    max_support: int,
    max_iters: int,
    tol: float,
    gap_tol: float,
    variant: int,
    max_weight: float,
    /,
    *outputs_and_num_threads: _View | int,
) -> None: ...
def select_cpu(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    max_support: int,
    max_iters: int,
    tol: float,
    gap_tol: float,
    variant: int,
    max_weight: float,
    total: int,
    exchange_passes: int,
    max_multiplicity: int,
    /,
    *outputs_and_num_threads: _View | int,
) -> None: ...
def sift_cpu(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    total: int,
    noise: float,
    alpha: float,
    max_multiplicity: int,
    /,
    *outputs_and_num_threads: _View | int,
) -> None: ...
def round_multiplicities_cpu(
    pool: _View,
    query: _View,
    indices: _View,
    weights: _View,
    candidates: _View,
    total: int,
    exchange_passes: int,
    max_multiplicity: int,
    counts: _View,
    num_threads: int,
    /,
) -> None: ...
def apportion_cpu(weights: _View, total: int, counts: _View, num_threads: int, /) -> None: ...

# In builds with CUDA only.
def lmo_cuda(
    pool: _View,
    direction: _View,
    lengths: _View,
    candidates: _View,
    index: _View,
    value: _View,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def knn_cuda(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    indices: _View,
    values: _View,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def duplicates_cuda(
    pool: _View,
    lengths: _View,
    candidates: _View,
    eps: float,
    representatives: _View,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def frank_wolfe_cuda(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    max_support: int,
    max_iters: int,
    tol: float,
    gap_tol: float,
    variant: int,
    max_weight: float,
    /,
    *outputs_workspace_and_stream: _View | int,
) -> None: ...
def select_cuda(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    max_support: int,
    max_iters: int,
    tol: float,
    gap_tol: float,
    variant: int,
    max_weight: float,
    total: int,
    exchange_passes: int,
    max_multiplicity: int,
    /,
    *outputs_workspace_and_stream: _View | int,
) -> None: ...
def sift_cuda(
    pool: _View,
    query: _View,
    lengths: _View,
    candidates: _View,
    total: int,
    noise: float,
    alpha: float,
    max_multiplicity: int,
    /,
    *outputs_workspace_and_stream: _View | int,
) -> None: ...
def round_multiplicities_cuda(
    pool: _View,
    query: _View,
    indices: _View,
    weights: _View,
    candidates: _View,
    total: int,
    exchange_passes: int,
    max_multiplicity: int,
    counts: _View,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def apportion_cuda(
    weights: _View, total: int, counts: _View, workspace: int, stream: int, /
) -> None: ...
def lmo_workspace_bytes(batch: int, positions: int, /) -> int: ...
def knn_workspace_bytes(batch: int, positions: int, k: int, /) -> int: ...
def gram_workspace_bytes(batch: int, positions: int, /) -> int: ...
def active_set_workspace_bytes(batch: int, positions: int, width: int, /) -> int: ...
def sift_workspace_bytes(batch: int, positions: int, vectors: int, total: int, /) -> int: ...
def corpus_workspace_bytes(batch: int, positions: int, dim: int, width: int, /) -> int: ...
def build_info() -> dict[str, Any]: ...
def usable_exchange(capsule: Any, /) -> bool: ...

# See optim/_layouts.py, which has the same in Python.
class Layouts:
    def __init__(self, exchange: Any, is_neg: Any, tensors: list[Any], hold: bool, /) -> None: ...
    def unmoved(self, tensors: list[Any], same_objects: bool, /) -> bool: ...
    def addresses(self, tensors: list[Any], of_gradients: bool, /) -> list[int] | None: ...

class StateLayouts:
    def __init__(self, exchange: Any, state: dict[Any, dict[str, Any]], /) -> None: ...
    def unmoved(self, state: dict[Any, dict[str, Any]], /) -> bool: ...

class WithBlock:
    def __init__(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *exc_info: object) -> None: ...

def adam_cpu(
    rows: int, count: int, grads: int, /, *codes_options_and_num_threads: float
) -> None: ...
def sgd_cpu(
    rows: int, count: int, grads: int, /, *codes_options_and_num_threads: float
) -> None: ...
def accumulate_cpu(
    rows: int, count: int, grads: int, grad_dtype: int, weight: float, num_threads: int, /
) -> float: ...
def squared_norm_cpu(
    rows: int, count: int, grads: int, grad_dtype: int, num_threads: int, /
) -> float: ...
def unlike_dicts(pairs: list[tuple[dict[Any, Any], dict[Any, Any]]], /) -> list[int]: ...
