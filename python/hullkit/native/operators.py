"""Every operator of hullkit: schema, CPU and CUDA implementation, fake.

All are out-variants without a return value: the caller allocates, so buffers can be reused, a fake
has nothing to get wrong, and `torch.compile(fullgraph=True)` sees only mutated arguments.
Arguments are batched or unbatched, as in the public functions, which check them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library

from . import kernels

_LIBRARY = library.Library("hullkit", "DEF")


def _operator(
    schema: str, cpu: Callable[..., None], cuda: Callable[..., None]
) -> Callable[..., None]:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    library.register_fake(f"hullkit::{name}", _fake, lib=_LIBRARY)
    overload: Callable[..., None] = getattr(torch.ops.hullkit, name).default
    return overload


def _fake(*_: Any) -> None:
    """Outputs are arguments: there is nothing to shape."""


# pool [n, d] or [B, n, d]; query [d] or [B, d]; lengths [] or [B]; candidates [n] or [B, n]
lmo = _operator(
    "lmo(Tensor pool, Tensor direction, Tensor? lengths, Tensor? candidates,"
    " Tensor(a!) index, Tensor(b!) value) -> ()",
    kernels.lmo_cpu,
    kernels.lmo_cuda,
)

knn = _operator(
    "knn(Tensor pool, Tensor query, Tensor? lengths, Tensor? candidates,"
    " Tensor(a!) indices, Tensor(b!) values) -> ()",
    kernels.knn_cpu,
    kernels.knn_cuda,
)

duplicates = _operator(
    "duplicates(Tensor pool, Tensor? lengths, Tensor? candidates, float eps,"
    " Tensor(a!) representatives) -> ()",
    kernels.duplicates_cpu,
    kernels.duplicates_cuda,
)

frank_wolfe = _operator(
    "frank_wolfe(Tensor pool, Tensor query, Tensor? lengths, Tensor? candidates,"
    " int max_support, int max_iters, float tol, float gap_tol, int variant, float max_weight,"
    " Tensor(a!) indices, Tensor(b!) weights, Tensor(c!) support_size, Tensor(d!) residual_norm,"
    " Tensor(e!) dual_gap, Tensor(f!) num_iters, Tensor(g!) status) -> ()",
    kernels.frank_wolfe_cpu,
    kernels.frank_wolfe_cuda,
)

select = _operator(
    "select(Tensor pool, Tensor query, Tensor? lengths, Tensor? candidates,"
    " int max_support, int max_iters, float tol, float gap_tol, int variant, float max_weight,"
    " int total, int exchange_passes, int max_multiplicity,"
    " Tensor(a!) indices, Tensor(b!) weights, Tensor(c!) support_size, Tensor(d!) residual_norm,"
    " Tensor(e!) dual_gap, Tensor(f!) num_iters, Tensor(g!) status,"
    " Tensor(h!) counts, Tensor(i!) counts_residual_norm) -> ()",
    kernels.select_cpu,
    kernels.select_cuda,
)

# query [d], [B, d] or [B, m, d]
sift = _operator(
    "sift(Tensor pool, Tensor query, Tensor? lengths, Tensor? candidates, int total, float noise,"
    " float alpha, int max_multiplicity, Tensor(a!) order, Tensor(b!) variance, Tensor(c!) indices,"
    " Tensor(d!) counts, Tensor(e!) num_steps) -> ()",
    kernels.sift_cpu,
    kernels.sift_cuda,
)

round_multiplicities = _operator(
    "round_multiplicities(Tensor pool, Tensor query, Tensor indices, Tensor weights,"
    " Tensor? candidates, int total, int exchange_passes, int max_multiplicity,"
    " Tensor(a!) counts) -> ()",
    kernels.round_multiplicities_cpu,
    kernels.round_multiplicities_cuda,
)

apportion = _operator(
    "apportion(Tensor weights, int total, Tensor(a!) counts) -> ()",
    kernels.apportion_cpu,
    kernels.apportion_cuda,
)
