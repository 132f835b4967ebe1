"""Tensors to the compiled core: addresses, shapes, strides. The only importer of `_core`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .torch_private import raw_stream

try:
    from .. import _core
except ImportError as error:  # a source tree on sys.path, or a build for another Python
    raise ImportError(
        "hullkit: the compiled module hullkit._core is missing or does not load "
        f"({error}). Build it with `pip install .` in the repository root, and do not run Python "
        "from a folder that holds hullkit's sources."
    ) from error

__version__ = _core.__version__
WithBlock = _core.WithBlock

_DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int64: 4,
}


def _kernel(native: Callable[..., None]) -> Callable[..., None]:
    """`native`, taking the operator's arguments: tensors become views, the rest stays as it is."""

    def run(*arguments: Any) -> None:
        native(*map(_native_argument, arguments), torch.get_num_threads())

    return run


def _native_argument(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    code = _DTYPE_CODES[argument.dtype]
    return (argument.data_ptr(), code, argument.shape, argument.stride())


lmo_cpu = _kernel(_core.lmo_cpu)
knn_cpu = _kernel(_core.knn_cpu)
duplicates_cpu = _kernel(_core.duplicates_cpu)
frank_wolfe_cpu = _kernel(_core.frank_wolfe_cpu)
select_cpu = _kernel(_core.select_cpu)
sift_cpu = _kernel(_core.sift_cpu)
round_multiplicities_cpu = _kernel(_core.round_multiplicities_cpu)
apportion_cpu = _kernel(_core.apportion_cpu)

usable_exchange = _core.usable_exchange
Layouts, StateLayouts = _core.Layouts, _core.StateLayouts


MAX_ON_DEVICE = 4096  # candidates of a prompt with a Gram matrix, points of a support
_MAX_K = 2048  # of knn over more than that


def _cuda_kernel(name: str, workspace_bytes: Callable[..., int]) -> Callable[..., None]:
    """The CUDA kernel `name`, with a workspace, on the current stream of its first argument."""
    native = getattr(_core, name, None)

    def run(*arguments: Any) -> None:
        device = arguments[0].device
        if native is None:
            raise NotImplementedError(
                f"{name.removesuffix('_cuda')}: expected CPU tensors, got device {device}: this "
                "build is without CUDA. Build with HULLKIT_CUDA=ON, move the inputs with .cpu(), "
                "or pass backend='reference' (slow)"
            )
        size = workspace_bytes(*arguments)
        with torch.cuda.device(device):
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            native(*map(_native_argument, arguments), workspace.data_ptr(), raw_stream(device))

    return run


def _sizes(pool: Tensor, query: Tensor, candidates: Tensor | None) -> tuple[int, int]:
    """B and n."""
    batch = 1 if query.ndim == 1 else query.shape[0]
    return batch, pool.shape[-2] if candidates is None else candidates.shape[-1]


def _lmo_bytes(
    pool: Tensor, direction: Tensor, lengths: Tensor | None, candidates: Tensor | None, *_: Any
) -> int:
    return _core.lmo_workspace_bytes(*_sizes(pool, direction, candidates))


def _knn_bytes(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    indices: Tensor,
    *_: Any,
) -> int:
    batch, size = _sizes(pool, query, candidates)
    k = indices.shape[-1]
    if size > MAX_ON_DEVICE and k > _MAX_K:
        raise NotImplementedError(
            f"k: expected at most {_MAX_K} for more than {MAX_ON_DEVICE} candidates on a CUDA "
            f"device, got {k}"
        )
    return _core.knn_workspace_bytes(batch, size, k)


def _duplicates_bytes(
    pool: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    eps: float,
    representatives: Tensor,
) -> int:
    batch, size = _sizes(pool, representatives, candidates)
    if size > MAX_ON_DEVICE:
        raise NotImplementedError(
            f"pool: expected at most {MAX_ON_DEVICE} candidates on a CUDA device, got {size}. Move "
            "the inputs with .cpu(), or pass candidates"
        )
    return _core.gram_workspace_bytes(batch, size)


def _frank_wolfe_bytes(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    max_support: int,
    max_iters: int,
    tol: float,
    gap_tol: float,
    variant: int,
    max_weight: float,
    indices: Tensor,
    *_: Any,
) -> int:
    batch, size = _sizes(pool, query, candidates)
    plain = variant == 0 and max_weight >= 1.0 and gap_tol < 0.0
    if size > MAX_ON_DEVICE and not plain:
        raise NotImplementedError(
            f"pool: expected at most {MAX_ON_DEVICE} candidates on a CUDA device for a variant "
            f"other than 'vanilla', gap_tol, max_weight or max_multiplicity, got {size}. Pass "
            "candidates (of hullkit.knn, for instance), or move the inputs with .cpu()"
        )
    if not plain:
        solved = indices.shape[-1] if variant == 3 else 0  # only this one has a Cholesky factor
        return _core.active_set_workspace_bytes(batch, size, solved)
    if size > MAX_ON_DEVICE:
        return _core.corpus_workspace_bytes(batch, size, pool.shape[-1], indices.shape[-1])
    return _core.gram_workspace_bytes(batch, size)


def _select_bytes(*arguments: Any) -> int:
    """As frank_wolfe without the options of rounding; a support may be rounded after it."""
    pool, query, _, candidates = arguments[:4]
    indices = arguments[13]
    size = _frank_wolfe_bytes(*arguments[:10], indices)
    if _sizes(pool, query, candidates)[1] > MAX_ON_DEVICE:
        size = max(size, _rounding_bytes(pool, query, indices))
    return size


def _sift_bytes(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    total: int,
    *_: Any,
) -> int:
    batch, size = _sizes(pool, query, candidates)
    vectors = query.shape[1] if query.ndim == 3 else 1
    if size + vectors - 1 > MAX_ON_DEVICE:
        raise NotImplementedError(
            f"sift: expected at most {MAX_ON_DEVICE} candidates of a prompt (with its vectors but "
            f"one) on a CUDA device, got {size + vectors - 1}. Take the nearest first: hullkit.knn"
        )
    return _core.sift_workspace_bytes(batch, size, vectors, total)


def _rounding_bytes(pool: Tensor, query: Tensor, indices: Tensor, *_: Any) -> int:
    size = indices.shape[-1]
    if size > MAX_ON_DEVICE:
        raise NotImplementedError(
            f"result.indices: expected a support of at most {MAX_ON_DEVICE} points on a CUDA "
            f"device, got {size}"
        )
    return _core.gram_workspace_bytes(query.shape[0] if query.ndim == 2 else 1, size)


lmo_cuda = _cuda_kernel("lmo_cuda", _lmo_bytes)
knn_cuda = _cuda_kernel("knn_cuda", _knn_bytes)
duplicates_cuda = _cuda_kernel("duplicates_cuda", _duplicates_bytes)
frank_wolfe_cuda = _cuda_kernel("frank_wolfe_cuda", _frank_wolfe_bytes)
select_cuda = _cuda_kernel("select_cuda", _select_bytes)
sift_cuda = _cuda_kernel("sift_cuda", _sift_bytes)
round_multiplicities_cuda = _cuda_kernel("round_multiplicities_cuda", _rounding_bytes)
apportion_cuda = _cuda_kernel("apportion_cuda", lambda *_: 0)


def _codes(dtypes: tuple[torch.dtype, ...]) -> tuple[int, ...]:
    return tuple(_DTYPE_CODES[dtype] for dtype in dtypes)


def _grads(record: Tensor) -> int:
    """Where the gradients' addresses begin, behind the options and three words of the GPU's."""
    return record.data_ptr() + 104


def adam_cpu(
    table: Tensor, size: int, record: Tensor, dtypes: tuple[torch.dtype, ...], *options: Any
) -> None:
    threads = torch.get_num_threads()
    _core.adam_cpu(table.data_ptr(), size, _grads(record), *_codes(dtypes), *options, threads)


def sgd_cpu(
    table: Tensor, size: int, record: Tensor, dtypes: tuple[torch.dtype, ...], *options: Any
) -> None:
    threads = torch.get_num_threads()
    _core.sgd_cpu(table.data_ptr(), size, _grads(record), *_codes(dtypes), *options, threads)


def accumulate_cpu(
    table: Tensor, size: int, record: Tensor, dtype: torch.dtype, weight: float
) -> Tensor:
    (code,) = _codes((dtype,))
    square = _core.accumulate_cpu(
        table.data_ptr(), size, _grads(record), code, weight, torch.get_num_threads()
    )
    return torch.tensor([square], dtype=torch.float64, device="cpu")


def squared_norm_cpu(table: Tensor, size: int, record: Tensor, dtype: torch.dtype) -> Tensor:
    (code,) = _codes((dtype,))
    square = _core.squared_norm_cpu(
        table.data_ptr(), size, _grads(record), code, torch.get_num_threads()
    )
    return torch.tensor([square], dtype=torch.float64, device="cpu")


def unlike_dicts(pairs: list[tuple[dict[Any, Any], dict[Any, Any]]]) -> list[int]:
    """The places of the pairs that do not hold the very same keys and values in one order."""
    return _core.unlike_dicts(pairs)


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
