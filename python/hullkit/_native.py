"""Tensors to the compiled core: addresses, shapes, strides. The only importer of `_core`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from . import _core
except ImportError as error:  # a source tree on sys.path, or a build for another Python
    raise ImportError(
        "hullkit: the compiled module hullkit._core is missing or does not load "
        f"({error}). Build it with `pip install .` in the repository root, and do not run Python "
        "from a folder that holds hullkit's sources."
    ) from error

__version__ = _core.__version__

_DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int64: 4,
}


def _view(tensor: Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    if tensor is None:
        return None
    return (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride())


def lmo_cpu(
    pool: Tensor,
    direction: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    index: Tensor,
    value: Tensor,
) -> None:
    _core.lmo_cpu(
        _view(pool),
        _view(direction),
        _view(lengths),
        _view(candidates),
        _view(index),
        _view(value),
        torch.get_num_threads(),
    )


def knn_cpu(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    indices: Tensor,
    values: Tensor,
) -> None:
    _core.knn_cpu(
        _view(pool),
        _view(query),
        _view(lengths),
        _view(candidates),
        _view(indices),
        _view(values),
        torch.get_num_threads(),
    )


def frank_wolfe_cpu(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    max_support: int,
    max_iters: int,
    tol: float,
    *outputs: Tensor,
) -> None:
    _core.frank_wolfe_cpu(
        _view(pool),
        _view(query),
        _view(lengths),
        _view(candidates),
        max_support,
        max_iters,
        tol,
        *map(_view, outputs),
        torch.get_num_threads(),
    )


def select_cpu(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    max_support: int,
    max_iters: int,
    tol: float,
    total: int,
    exchange_passes: int,
    *outputs: Tensor,
) -> None:
    _core.select_cpu(
        _view(pool),
        _view(query),
        _view(lengths),
        _view(candidates),
        max_support,
        max_iters,
        tol,
        total,
        exchange_passes,
        *map(_view, outputs),
        torch.get_num_threads(),
    )


def round_multiplicities_cpu(
    pool: Tensor,
    query: Tensor,
    indices: Tensor,
    weights: Tensor,
    candidates: Tensor | None,
    total: int,
    exchange_passes: int,
    counts: Tensor,
) -> None:
    _core.round_multiplicities_cpu(
        _view(pool),
        _view(query),
        _view(indices),
        _view(weights),
        _view(candidates),
        total,
        exchange_passes,
        _view(counts),
        torch.get_num_threads(),
    )


def apportion_cpu(weights: Tensor, total: int, counts: Tensor) -> None:
    _core.apportion_cpu(_view(weights), total, _view(counts), torch.get_num_threads())


def build_info() -> dict[str, Any]:
    """What this build contains and what this machine offers it.

    Returns:
        dict with `version`, `compiler`, `simd` (instruction set the CPU kernels use here: portable,
        avx2 or avx512; the environment variable HULLKIT_SIMD lowers it), `cuda` (built with CUDA),
        `cuda_runtime`, `cuda_architectures`, `cuda_devices` (one line each) and `cuda_problem` (why
        there are none).

    Runs a one-thread kernel on every CUDA device to prove that this build's code loads there, so
    the first call initialises them.
    """
    return _core.build_info()
