"""Tensors to the compiled core: addresses, shapes, strides. The only importer of `_core`."""

from __future__ import annotations

from collections.abc import Callable
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


def _view(tensor: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride())


def _kernel(native: Callable[..., None]) -> Callable[..., None]:
    """`native`, taking the operator's arguments: tensors become views, the rest stays as it is."""

    def run(*arguments: Any) -> None:
        native(*map(_native_argument, arguments), torch.get_num_threads())

    return run


def _native_argument(argument: Any) -> Any:
    return _view(argument) if isinstance(argument, Tensor) else argument


lmo_cpu = _kernel(_core.lmo_cpu)
knn_cpu = _kernel(_core.knn_cpu)
frank_wolfe_cpu = _kernel(_core.frank_wolfe_cpu)
select_cpu = _kernel(_core.select_cpu)
round_multiplicities_cpu = _kernel(_core.round_multiplicities_cpu)
apportion_cpu = _kernel(_core.apportion_cpu)


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
