# SPDX-License-Identifier: Apache-2.0
"""Calls of the compiled core: threads, device, workspace, stream. The only importer of `_core`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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
uninterrupted = _core.uninterrupted
DictCopies = _core.DictCopies

# Numbers that cross for names, as the core declares them.
STATUSES = _core.statuses
VARIANTS = _core.variants
LAYOUTS = _core.layouts  # fields of what kernels read, in order
_DTYPE_CODES = {getattr(torch, name): code for name, code in _core.dtypes.items()}
_core.name_dtypes(_DTYPE_CODES)


def argument_names(operation: str) -> tuple[str, ...]:
    """Names of the operation's arguments, in the order of its operator."""
    return _core.operations[operation].arguments


def schema(operation: str) -> str:
    """The operator's schema, from the arguments that csrc/bindings/operations.cpp declares."""
    return _core.operations[operation].schema


# Kernels take the arguments of their operator, in its order. They are plain functions: torch takes
# longer to call a method.
def cpu_kernel(operation: str) -> Callable[..., None]:
    native = _core.operations[operation].cpu

    def run(*arguments: Any) -> None:
        native(*arguments, torch.get_num_threads())

    return run


def check_devices(operation: str, first: Tensor, *others: Any) -> None:
    for name, argument in zip(argument_names(operation)[1:], others, strict=True):
        if isinstance(argument, Tensor) and argument.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, got {argument.device}")


def cuda_kernel(operation: str) -> Callable[..., None]:
    """Runs on the current stream of the device of its first tensor, in a workspace of torch's."""
    native = _core.operations[operation].cuda

    def run(first: Tensor, *others: Any) -> None:
        device = first.device
        if native is None:
            raise NotImplementedError(
                f"{operation}: expected CPU tensors, got device {device}: this "
                "build is without CUDA. Build with HULLKIT_CUDA=ON, move the inputs with .cpu(), "
                "or pass backend='reference' (slow)"
            )
        check_devices(operation, first, *others)

        def allocate(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.uint8, device=device)

        with torch.cuda.device(device):
            native(first, *others, allocate, raw_stream(device))

    return run


usable_exchange = _core.usable_exchange
Layouts, StateLayouts = _core.Layouts, _core.StateLayouts


def _table_arguments(
    table: Tensor, record: Tensor, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> dict[str, int]:
    """dtypes: of parameter, gradient and state."""
    param, grad, state = dtypes
    return {
        "rows": table.data_ptr(),
        "count": table.shape[0],
        "record": record.data_ptr(),
        "param_dtype": _DTYPE_CODES[param],
        "grad_dtype": _DTYPE_CODES[grad],
        "state_dtype": _DTYPE_CODES[state],
    }


def adam_cpu(
    table: Tensor,
    record: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    num_steps: int,
    stochastic_rounding: bool,
) -> None:
    _core.adam_cpu(
        **_table_arguments(table, record, dtypes),
        num_steps=num_steps,
        stochastic_rounding=stochastic_rounding,
        num_threads=torch.get_num_threads(),
    )


def sgd_cpu(
    table: Tensor,
    record: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    num_steps: int,
) -> None:
    _core.sgd_cpu(
        **_table_arguments(table, record, dtypes),
        num_steps=num_steps,
        num_threads=torch.get_num_threads(),
    )


def accumulate_cpu(table: Tensor, record: Tensor, dtype: torch.dtype) -> Tensor:
    """dtype: of the gradients."""
    return _sum_of_squares(_core.accumulate_cpu, table, record, dtype)


def squared_norm_cpu(table: Tensor, record: Tensor, dtype: torch.dtype) -> Tensor:
    """dtype: of the gradients."""
    return _sum_of_squares(_core.squared_norm_cpu, table, record, dtype)


def _sum_of_squares(
    native: Callable[..., float], table: Tensor, record: Tensor, dtype: torch.dtype
) -> Tensor:
    square = native(
        rows=table.data_ptr(),
        count=table.shape[0],
        record=record.data_ptr(),
        grad_dtype=_DTYPE_CODES[dtype],
        num_threads=torch.get_num_threads(),
    )
    return torch.tensor([square], dtype=torch.float64, device="cpu")


@cache
def _usable(native: Callable[[], bool], device: torch.device) -> bool:
    """What a question about the current device answers of this one."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return native()


PRODUCT_TILE: int = _core.adam_product_tile  # elements on both sides of a tile of adam_product


def adam_product_usable(device: torch.device) -> bool:
    """Whether this build's `adam_product_cuda` runs on the device."""
    return _usable(_core.adam_product_usable, device)


def adam_product_cuda(
    table: Tensor,
    factors: Tensor,
    record: Tensor,
    chunks: Tensor,
    coefficients: Tensor,
    copies: Tensor | None,
    param_dtype: torch.dtype,
    stochastic_rounding: bool,
) -> None:
    """Runs on the current stream of the tensors' device."""
    with torch.cuda.device(table.device):
        _core.adam_product_cuda(
            rows=table.data_ptr(),
            factors=factors.data_ptr(),
            record=record.data_ptr(),
            chunks=chunks.data_ptr(),
            coefficients=coefficients.data_ptr(),
            copies=0 if copies is None else copies.data_ptr(),
            programs=len(chunks),
            capacity=coefficients.shape[1],
            param_dtype=_DTYPE_CODES[param_dtype],
            stochastic_rounding=stochastic_rounding,
            stream=raw_stream(table.device),
        )


MOST_PRODUCT_RESULTS: int = _core.most_product_results
MOST_PRODUCT_TERMS: int = _core.most_product_terms
MOST_PRODUCT_GRADIENTS: int = _core.most_product_gradients
PRODUCT_TILE_COLUMNS: int = _core.product_tile_columns
PRODUCT_TILE_ROWS: tuple[int, ...] = _core.product_tile_rows  # of a slot: one of these


def product_sums_usable(device: torch.device) -> bool:
    """Whether this build's `product_sums_cuda` runs on the device."""
    return _usable(_core.product_sums_usable, device)


def product_sums_cuda(
    matrices: Tensor,
    num_results: int,
    num_terms: int,
    transposed: bool,
    num_gradients: int,
    wide_gradients: bool,
    device: torch.device,
) -> None:
    """Runs on the current stream of the device.

    matrices: as csrc/include/hullkit/product_sums.h has them, int64 on the host.
    """
    with torch.cuda.device(device):
        _core.product_sums_cuda(
            matrices=matrices.data_ptr(),
            num_results=num_results,
            num_terms=num_terms,
            transposed=transposed,
            num_gradients=num_gradients,
            wide_gradients=wide_gradients,
            stream=raw_stream(device),
        )


def build_info() -> dict[str, Any]:
    """The contents of this build, and the devices that this machine offers it.

    Returns:
        dict with `version`, `compiler`, `simd` (instruction set the CPU kernels use here: portable,
        avx2, avx512 or neon; the environment variable HULLKIT_SIMD lowers it), `cuda` (built with
        CUDA), `cuda_runtime`, `cuda_architectures`, `cuda_devices` (one line each) and
        `cuda_problem` (why there are none).

    Runs a one-thread kernel on every CUDA device to prove that this build's code loads there, so
    the first call initialises them.

    >>> import hullkit
    >>> hullkit.build_info()["version"] == hullkit.__version__
    True
    """
    return _core.build_info()
