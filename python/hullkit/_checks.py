# SPDX-License-Identifier: Apache-2.0
"""Argument checks of every public function: names the argument, what was expected, what came.

Checks read shapes, dtypes and devices only. Values (NaN, Inf, lengths and candidates out of range)
are checked by the kernels, which read them anyway; on CUDA devices, where raising would mean to
wait, the results say so.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_UNSIGNED = (torch.uint64, torch.uint32, torch.uint16, torch.uint8)
MAX_TOTAL = 2**40  # quotas are float64: their floors are exact far beyond any budget up to here
# What rounding may take from a cap on weights: 1 / 49 of 49 candidates is enough, though 49 times
# that is less than 1. Less than 1 / MAX_TOTAL, so that a cap of max_multiplicity / total needs
# ceil(total / max_multiplicity) weights, as the integers say.
CAP_SLACK = 2.0**-42


def check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.is_nested:  # of the older kind, whose layout is strided
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    return value


def bytes_reached(tensor: Tensor) -> int:
    """How long a storage must be to hold every element of the tensor."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((n - 1) * stride for n, stride in steps)
    return int((last + 1) * tensor.element_size())


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage holds every element still: FSDP, for one, frees it under a tensor."""
    held = tensor.untyped_storage().nbytes()
    if tensor.storage_offset() == 0 and tensor.is_contiguous():  # all but a few
        return held >= tensor.nbytes
    return held >= bytes_reached(tensor)


def check_floating(name: str, value: Any) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"{name}: expected dtype float64, float32, float16 or bfloat16, got {tensor.dtype}"
        )
    return tensor


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> Any:
    """An int, also one of NumPy's, or the symbol for one while torch.compile traces."""
    if not isinstance(value, (int, torch.SymInt)) and isinstance(value, numbers.Integral):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} ({value!r})")
    if value < minimum or (maximum is not None and value > maximum):
        bound = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(f"{name}: expected an int {bound}, got {value}")
    if maximum is None and isinstance(value, int):
        check_below_2_63(name, value)  # the operators take int64
    return value


def check_total(value: Any) -> Any:
    return check_int("total", value, 1, MAX_TOTAL)


def check_real(name: str, value: Any) -> Any:
    """An int or float, of any real number, also one of NumPy's, or the symbol for a float."""
    if not isinstance(value, (int, float, torch.SymFloat)) and isinstance(value, numbers.Real):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} ({value!r})")
    return value


def check_number(name: str, value: Any, minimum: float) -> float:
    """A float, of any real number, also one of NumPy's, or the symbol for one."""
    value = check_real(name, value)
    if not value >= minimum:  # also refuses NaN
        raise ValueError(f"{name}: expected a number >= {minimum}, got {value}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name}: expected a number within the range of float64, got an int beyond it"
        ) from None


def check_finite(name: str, value: Any, below: float = float("inf")) -> float:
    """A number in [0, below)."""
    number = check_number(name, value, 0.0)
    if number >= below:
        raise ValueError(f"{name}: expected a number below {below}, got {number}")
    return number


def check_betas(value: Any) -> tuple[float, float]:
    """Adam's pair of numbers in [0, 1)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"betas: expected a pair of numbers, got {value!r}")
    first, second = (check_finite(f"betas[{i}]", b, below=1.0) for i, b in enumerate(value))
    return first, second


def check_positive(name: str, value: Any) -> float:
    number = check_number(name, value, -float("inf"))
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return number


def check_cap(max_multiplicity: Any, positions: int, total: int, of: str = "candidates") -> Any:
    """How often one of `positions` candidates may be taken, so that `total` can be reached."""
    if max_multiplicity is None:
        return total
    max_multiplicity = check_int("max_multiplicity", max_multiplicity, 1)
    if max_multiplicity * positions < total:
        raise ValueError(
            f"max_multiplicity: expected at least total / {positions} for total = {total} and "
            f"{positions} {of}, got {max_multiplicity}"
        )
    return min(max_multiplicity, total)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    # Others, arrays of no dimension among them, may have no truth value, or no hash.
    plain = value is None or isinstance(value, (str, numbers.Number))
    if not plain or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_device(operation: str, tensor: Tensor, backend: str | None) -> None:
    """Kernels exist for CPU and CUDA tensors; anything slower only on request."""
    check_choice("backend", backend, (None, "reference"))
    if backend is None and not (tensor.is_cpu or tensor.is_cuda):
        raise NotImplementedError(
            f"{operation}: expected CPU or CUDA tensors, got device {tensor.device}. Move the "
            "inputs with .cpu(), or pass backend='reference' (slow)"
        )


def check_like(name: str, tensor: Tensor, pool: Tensor) -> None:
    if tensor.device != pool.device:
        raise ValueError(f"{name}: expected the pool's device {pool.device}, got {tensor.device}")


def is_readable(tensor: Tensor) -> bool:
    """Whether kernels can walk its coordinates: with stride 1."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def as_readable(tensor: Tensor) -> Tensor:
    """Kernels walk coordinates with stride 1 and know no autograd; any other stride is copied."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if is_readable(tensor):
        return tensor
    if tensor.ndim == 3 and tensor.shape[0] > 1 and tensor.stride(0) == 0:  # one for the batch
        return tensor[0].contiguous().expand(tensor.shape)
    return tensor.contiguous()


def has_values(tensor: Tensor) -> bool:
    """Whether its values may be looked at: a device would have to be waited for, and there are none
    while torch traces, nor in a fake tensor (a subclass that takes all operations itself)."""
    if not tensor.is_cpu or torch.compiler.is_compiling():
        return False
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def as_int64(name: str, tensor: Tensor, most: int) -> Tensor:
    """An integer tensor as int64. most: what its values may be at most, for the error.

    uint64 is read by its bits: 2**64 - 1, which -1 becomes there, is -1 again. Any other value
    beyond int64 is refused; on a CUDA device the kernels see a negative, and mark the entry.
    """
    if tensor.dtype is torch.int64:
        return tensor
    if tensor.dtype not in _SIGNED + _UNSIGNED:
        raise TypeError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.dtype is not torch.uint64:
        return tensor.to(torch.int64)
    signed = tensor.view(torch.int64)
    if has_values(signed):
        beyond = signed[signed < -1]
        if len(beyond):
            raise ValueError(f"{name}: expected at most {most}, got {int(beyond[0]) + 2**64}")
    return signed


def check_below_2_63(name: str, value: int) -> None:
    if value >= 2**63:
        raise ValueError(f"{name}: expected a value below 2**63, got {value}")


def check_integers(
    name: str, value: Any, shape: tuple[int, ...], pool: Tensor, most: int
) -> Tensor:
    """An integer tensor of exactly `shape` on the pool's device, as int64. most: see `as_int64`."""
    tensor = as_int64(name, check_tensor(name, value), most)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    check_like(name, tensor, pool)
    return tensor
