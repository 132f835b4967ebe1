# SPDX-License-Identifier: Apache-2.0
"""The oracles behind the operators' signatures: this is `backend="reference"`.

Each function fills the same output tensors as the operator of its name, one query after another;
like the operators they take batched and unbatched arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import CAP_SLACK
from ..native.kernels import STATUSES, VARIANTS, argument_names
from . import apportion as _apportion
from . import duplicates as _duplicates
from . import frank_wolfe as _frank_wolfe
from . import knn as _knn
from . import lmo as _lmo
from . import round_multiplicities as _round_multiplicities
from . import sift as _sift
from .lmo import Array

_VARIANTS = {code: name for name, code in VARIANTS.items()}


def as_operator(oracle: Callable[..., None]) -> Callable[..., None]:
    """`oracle`, called as the operator of its name: it gets every argument by name.

    ImportError unless the two take the same arguments. `**options` stands for any more.
    """
    names = argument_names(oracle.__name__)
    parameters = inspect.signature(oracle).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if not named <= set(names) or (len(named) == len(parameters) and named != set(names)):
        raise ImportError(f"{oracle.__name__}: expected arguments {names}, got {sorted(named)}")

    @wraps(oracle)
    def run(*arguments: Any, **by_name: Any) -> None:
        by_place = dict(zip(names[: len(arguments)], arguments, strict=True))
        oracle(**by_place, **by_name)

    return run


class _Problem(NamedTuple):
    pool: Array  # valid candidates only
    query: Array
    positions: NDArray[np.int64]  # [valid] position of each of them


def _finite(name: str, tensor: Tensor) -> Array:
    values: Array = tensor.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values, got NaN or Inf")
    return values


def _listed_rows(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
) -> Iterator[tuple[int, Tensor, Tensor, NDArray[np.int64]]]:
    """Each entry's pool and query, and the row at each position, -1 where there is none: beyond
    lengths, whatever stands there. Rows may be out of range."""
    if query.ndim == 1:
        query = query.unsqueeze(0)
        lengths = None if lengths is None else lengths.unsqueeze(0)
        candidates = None if candidates is None else candidates.unsqueeze(0)
    if pool.ndim == 2:
        pool = pool.expand(query.shape[0], -1, -1)
    for b in range(query.shape[0]):
        n = pool.shape[1] if candidates is None else candidates.shape[1]
        rows = np.arange(n) if candidates is None else candidates[b].cpu().numpy().copy()
        if lengths is not None:
            length = int(lengths[b])
            if not 1 <= length <= n:
                raise ValueError(f"lengths: expected 1 <= lengths[{b}] <= {n}, got {length}")
            rows[length:] = -1
        yield b, pool[b], query[b], rows


def _check_row(pool: Tensor, row: int, b: int, position: int) -> None:
    if not -1 <= row < len(pool):
        raise ValueError(
            f"candidates: expected rows 0..{len(pool) - 1} (-1 for none), "
            f"got {row} at [{b}, {position}]"
        )


def _finite_rows(pool: Tensor, rows: NDArray[np.int64]) -> Array:
    return _finite("pool", pool[torch.from_numpy(rows).to(pool.device)])


def _problems(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    query_name: str = "query",
) -> Iterator[tuple[int, _Problem]]:
    for b, own, vector, rows in _listed_rows(pool, query, lengths, candidates):
        for position, row in enumerate(rows.tolist()):
            _check_row(own, row, b, position)
        positions = np.flatnonzero(rows >= 0)
        if len(positions) == 0:
            raise ValueError(
                f"candidates: expected at least one candidate in entry {b}, got only -1"
            )
        valid = _finite_rows(own, rows[positions])
        yield b, _Problem(valid, _finite(query_name, vector), positions)


def _entries(*outputs: Tensor, rank: int) -> list[Tensor]:
    """Views of the outputs with a batch dimension in front of `rank` others."""
    return [out if out.ndim > rank else out.unsqueeze(0) for out in outputs]


def _fill(out: Tensor, values: Array | NDArray[np.int64], padding: float) -> None:
    out.fill_(padding)
    out[: len(values)] = torch.from_numpy(np.ascontiguousarray(values)).to(out.device)


@as_operator
def lmo(
    pool: Tensor,
    direction: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    index: Tensor,
    value: Tensor,
) -> None:
    index, value = _entries(index, value, rank=0)
    for b, problem in _problems(pool, direction, lengths, candidates, "direction"):
        best, value[b] = _lmo(problem.pool, problem.query)
        index[b] = int(problem.positions[best])


@as_operator
def knn(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    indices: Tensor,
    values: Tensor,
) -> None:
    indices, values = _entries(indices, values, rank=1)
    for b, problem in _problems(pool, query, lengths, candidates):
        nearest, products = _knn(problem.pool, problem.query, indices.shape[1])
        _fill(indices[b], problem.positions[nearest], -1)
        _fill(values[b], products, -np.inf)


@as_operator
def duplicates(
    pool: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    eps: float,
    representatives: Tensor,
) -> None:
    any_row = pool.new_zeros(*representatives.shape[:-1], pool.shape[-1])
    (representatives,) = _entries(representatives, rank=1)
    representatives.fill_(-1)
    for b, problem in _problems(pool, any_row, lengths, candidates):
        found = problem.positions[_duplicates(problem.pool, eps)]
        representatives[b, torch.from_numpy(problem.positions).to(pool.device)] = torch.from_numpy(
            found
        ).to(pool.device)


@as_operator
def frank_wolfe(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    gap_tol: float,
    variant: int,
    max_weight: float,
    indices: Tensor,
    weights: Tensor,
    support_size: Tensor,
    residual_norm: Tensor,
    dual_gap: Tensor,
    num_iters: Tensor,
    status: Tensor,
    **options: Any,
) -> None:
    indices, weights = _entries(indices, weights, rank=1)
    scalars = _entries(support_size, residual_norm, dual_gap, num_iters, status, rank=0)
    for b, problem in _problems(pool, query, lengths, candidates):
        if len(problem.pool) * max_weight < 1 - CAP_SLACK:
            raise ValueError(
                f"max_weight: expected at least 1 / {len(problem.pool)} for the "
                f"{len(problem.pool)} candidates of entry {b}, got {max_weight}"
            )
        outcome = _frank_wolfe(
            problem.pool,
            problem.query,
            gap_tol=None if gap_tol < 0 else gap_tol,
            variant=_VARIANTS[variant],
            max_weight=max_weight,
            **options,
        )
        _fill(indices[b], problem.positions[outcome.indices], -1)
        _fill(weights[b], outcome.weights, 0)
        certificates = (
            len(outcome.indices),
            outcome.residual_norm,
            outcome.dual_gap,
            outcome.num_iters,
            STATUSES[outcome.status],
        )
        for out, scalar in zip(scalars, certificates, strict=True):
            out[b] = scalar


@as_operator
def select(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    total: int,
    exchange_passes: int,
    max_multiplicity: int,
    indices: Tensor,
    weights: Tensor,
    counts: Tensor,
    counts_residual_norm: Tensor,
    **options_and_certificates: Any,
) -> None:
    problems: dict[str, Any] = {
        "pool": pool,
        "query": query,
        "lengths": lengths,
        "candidates": candidates,
    }
    for b, problem in _problems(**problems):
        if max_multiplicity * len(problem.pool) < total:
            raise ValueError(
                f"max_multiplicity: expected at least {-(-total // len(problem.pool))} for a total "
                f"of {total} over the {len(problem.pool)} candidates of entry {b}, "
                f"got {max_multiplicity}"
            )
    support = {"indices": indices, "weights": weights}
    frank_wolfe(**problems, **support, **options_and_certificates)
    round_multiplicities(
        pool=pool,
        query=query,
        candidates=candidates,
        **support,
        total=total,
        exchange_passes=exchange_passes,
        max_multiplicity=max_multiplicity,
        counts=counts,
    )
    indices, counts = _entries(indices, counts, rank=1)
    (norms,) = _entries(counts_residual_norm, rank=0)
    for b, problem in _problems(**problems):
        used = indices[b] >= 0
        places = np.searchsorted(problem.positions, indices[b, used].cpu().numpy())
        shares = counts[b, used].cpu().numpy() / total
        norms[b] = float(np.linalg.norm(problem.query - shares @ problem.pool[places]))


@as_operator
def sift(
    pool: Tensor,
    query: Tensor,
    lengths: Tensor | None,
    candidates: Tensor | None,
    total: int,
    noise: float,
    alpha: float,
    max_multiplicity: int,
    order: Tensor,
    variance: Tensor,
    indices: Tensor,
    counts: Tensor,
    num_steps: Tensor,
) -> None:
    order, variance, indices, counts = _entries(order, variance, indices, counts, rank=1)
    (num_steps,) = _entries(num_steps, rank=0)
    for b, problem in _problems(pool, query, lengths, candidates):
        outcome = _sift(problem.pool, problem.query, total, noise, alpha or None, max_multiplicity)
        distinct, first, often = np.unique(outcome.order, return_index=True, return_counts=True)
        by_first = np.argsort(first)
        _fill(order[b], problem.positions[outcome.order], -1)
        _fill(variance[b], outcome.variance, outcome.variance[-1])
        _fill(indices[b], problem.positions[distinct[by_first]], -1)
        _fill(counts[b], often[by_first], 0)
        num_steps[b] = len(outcome.order)


def _support(
    pool: Tensor, rows: NDArray[np.int64], indices: NDArray[np.int64], b: int
) -> NDArray[np.int64]:
    """The pool's rows at the positions in `indices`, which -1 ends. `rows` has the row at each
    position; those that `indices` does not name may be anything."""
    named = indices[: (*np.flatnonzero(indices == -1), len(indices))[0]]
    for behind in np.flatnonzero(indices[len(named) :] != -1):
        place = len(named) + int(behind)
        raise ValueError(
            f"result.indices: expected -1 behind another one, got {indices[place]} at "
            f"[{b}, {place}]"
        )
    if len(named) == 0:
        raise ValueError(f"result.indices: expected a row in entry {b}, got only padding, -1")
    for place, position in enumerate(named.tolist()):
        if not 0 <= position < len(rows):
            raise ValueError(
                f"result.indices: expected positions 0..{len(rows) - 1} (-1 for padding), "
                f"got {position} at [{b}, {place}]"
            )
        if rows[position] == -1:
            raise ValueError(
                f"candidates: expected a row at position {position} that result.indices names, got "
                "-1"
            )
        _check_row(pool, int(rows[position]), b, position)
    return rows[named]


def _weights(tensor: Tensor) -> Array:
    values = _finite("weights", tensor)
    with np.errstate(over="ignore"):
        weight_sum = np.maximum(values, 0.0).sum()
    if not np.isfinite(weight_sum):
        raise ValueError(f"weights: expected a finite sum, got {weight_sum}")
    return values


@as_operator
def round_multiplicities(
    pool: Tensor,
    query: Tensor,
    indices: Tensor,
    weights: Tensor,
    candidates: Tensor | None,
    total: int,
    exchange_passes: int,
    max_multiplicity: int,
    counts: Tensor,
) -> None:
    indices, weights, counts = _entries(indices, weights, counts, rank=1)
    for b, own, vector, rows in _listed_rows(pool, query, None, candidates):
        support = _support(own, rows, indices[b].cpu().numpy(), b)
        if max_multiplicity * len(support) < total:
            raise ValueError(
                f"max_multiplicity: expected at least {-(-total // len(support))} for a total of "
                f"{total} over the {len(support)} support points of entry {b}, "
                f"got {max_multiplicity}"
            )
        result = _round_multiplicities(
            _finite_rows(own, support),
            _finite("query", vector),
            _weights(weights[b, : len(support)]),
            total,
            exchange_passes,
            max_multiplicity,
        )
        _fill(counts[b], result, 0)


@as_operator
def apportion(weights: Tensor, total: int, counts: Tensor) -> None:
    weights, counts = _entries(weights, counts, rank=1)
    for b in range(weights.shape[0]):
        _fill(counts[b], _apportion(_weights(weights[b]), total), 0)
