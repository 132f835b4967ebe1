"""Argument checks of every public function: names the argument, what was expected, what came.

Checks read shapes, dtypes and devices only. Values (NaN, Inf, lengths and candidates out of range)
are checked by the kernels, which read them anyway; on CUDA devices, where raising would mean to
wait, the results say so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_UNSIGNED = (torch.uint64, torch.uint32, torch.uint16, torch.uint8)
MAX_TOTAL = 2**40  # quotas are float64: their floors are exact far beyond any budget up to here


class Problem(NamedTuple):
    """Checked inputs of a selection, as the operators take them: batched or not."""

    pool: Tensor  # [n, d] or [B, n, d], unit stride along d
    query: Tensor  # [d] or [B, d] or, where several are allowed, [B, m, d]; unit stride along d
    lengths: Tensor | None  # [] or [B] int64
    candidates: Tensor | None  # [n] or [B, n] int64

    @property
    def positions(self) -> int:
        """n, the number of candidate positions of each query."""
        return self.pool.shape[-2] if self.candidates is None else self.candidates.shape[-1]

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised output, `shape` behind the batch dimension if there is one."""
        if self.query.ndim > 1:
            shape = (self.query.shape[0], *shape)
        # Single sizes: reading a tuple takes torch half as long again, a torch.Size twice as long.
        return self.query.new_empty(*(shape or ((),)), dtype=dtype)


def check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    return value


def check_floating(name: str, value: Any) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"{name}: expected dtype float64, float32, float16 or bfloat16, got {tensor.dtype}"
        )
    return tensor


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> Any:
    """An int, or the symbol that stands for one while torch.compile traces."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} ({value!r})")
    if value < minimum or (maximum is not None and value > maximum):
        bound = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(f"{name}: expected an int {bound}, got {value}")
    return value


def check_total(value: Any) -> Any:
    return check_int("total", value, 1, MAX_TOTAL)


def check_number(name: str, value: Any, minimum: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} ({value!r})")
    if not value >= minimum:  # also refuses NaN
        raise ValueError(f"{name}: expected a number >= {minimum}, got {value}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    number = check_number(name, value, 0.0)
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return number


def check_cap(max_multiplicity: Any, positions: int, total: int, of: str = "candidates") -> Any:
    """How often one of `positions` candidates may be taken, so that `total` can be reached."""
    if max_multiplicity is None:
        return total
    check_int("max_multiplicity", max_multiplicity, 1)
    if max_multiplicity * positions < total:
        raise ValueError(
            f"max_multiplicity: expected at least total / {positions} for total = {total} and "
            f"{positions} {of}, got {max_multiplicity}"
        )
    return min(max_multiplicity, total)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
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


def _same(name: str, tensor: Tensor, pool: Tensor) -> None:
    if tensor.device != pool.device:
        raise ValueError(f"{name}: expected the pool's device {pool.device}, got {tensor.device}")


def _readable(tensor: Tensor) -> Tensor:
    """Kernels walk coordinates with stride 1 and know no autograd; any other stride is copied."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_int64(name: str, tensor: Tensor) -> Tensor:
    """An integer tensor as int64.

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
    if signed.is_cpu and not torch.compiler.is_compiling():
        beyond = signed[signed < -1]
        if len(beyond):
            check_below_2_63(name, int(beyond[0]) + 2**64)
    return signed


def check_below_2_63(name: str, value: int) -> None:
    if value >= 2**63:
        raise ValueError(f"{name}: expected a value below 2**63, got {value}")


def check_integers(name: str, value: Any, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """An integer tensor of exactly `shape` on the pool's device, as int64."""
    tensor = as_int64(name, check_tensor(name, value))
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    _same(name, tensor, pool)
    return tensor


def check_pool_query(
    pool: Any,
    query: Any,
    lengths: Any = None,
    candidates: Any = None,
    *,
    query_name: str = "query",
    several: bool = False,
) -> Problem:
    """Checks the inputs that every selection shares.

    pool (n, d) with query (d,): one problem. pool (n, d) with query (B, d): one pool for all.
    pool (B, n, d) with query (B, d): a pool each. candidates needs a shared pool.
    several: query (B, m, d) is a batch of prompts of m vectors each.
    """
    pool = check_floating("pool", pool)
    query = check_floating(query_name, query)
    if query.dtype != pool.dtype:
        raise TypeError(f"{query_name}: expected the pool's dtype {pool.dtype}, got {query.dtype}")
    _same(query_name, query, pool)
    rows, row = pool.shape, query.shape  # read once: every look at a tensor takes time
    if len(rows) not in (2, 3):
        raise ValueError(f"pool: expected shape (n, d) or (B, n, d), got {tuple(rows)}")
    if len(row) not in (1, 2) and not (several and len(row) == 3 and row[1] > 0):
        shapes = "(d,), (B, d) or (B, m, d) with m >= 1" if several else "(d,) or (B, d)"
        raise ValueError(f"{query_name}: expected shape {shapes}, got {tuple(row)}")
    if len(rows) == 3 and (len(row) == 1 or row[0] != rows[0]):
        raise ValueError(
            f"{query_name}: expected shape ({rows[0]}, {rows[2]}) for a pool of shape "
            f"{tuple(rows)}, got {tuple(row)}"
        )
    if row[-1] != rows[-1]:
        raise ValueError(
            f"{query_name}: expected d = {rows[-1]} coordinates as in the pool, got {row[-1]}"
        )
    if rows[-1] == 0 or rows[-2] == 0:
        raise ValueError(
            f"pool: expected at least one row and one coordinate, got shape {tuple(rows)}"
        )
    if lengths is None and candidates is None:
        return Problem(_readable(pool), _readable(query), None, None)
    leading = tuple(row[: min(len(row) - 1, 1)])  # () or (B,)
    if lengths is not None:
        lengths = check_integers("lengths", lengths, leading, pool)
    if candidates is not None:
        candidates = check_tensor("candidates", candidates)
        if len(rows) != 2:
            raise ValueError(
                "candidates: expected a shared pool of shape (M, d), "
                f"got a pool of shape {tuple(rows)}"
            )
        if candidates.ndim != len(leading) + 1 or candidates.shape[-1] == 0:
            raise ValueError(
                f"candidates: expected shape {(*leading, 'n')} with n >= 1, "
                f"got {tuple(candidates.shape)}"
            )
        candidates = check_integers(
            "candidates", candidates, (*leading, candidates.shape[-1]), pool
        )

    return Problem(_readable(pool), _readable(query), lengths, candidates)
