# SPDX-License-Identifier: Apache-2.0
"""Every selection kernel once, on small problems: `make sanitize` runs it under compute-sanitizer.
Low-rank products too, whose programs wait for one another's parts, sums of products, and updates
that multiply.

All dtypes; pools of a prompt's own, shared ones with candidates, ragged ones whose rows are not
aligned to 16 bytes; and the few sizes that take another way. `2/8` takes part 2 of 8 (0 to 7).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import hullkit
import torch
from _gpu import DTYPES, problem
from _products import Matrices
from hullkit.language_model import low_rank_products as products
from hullkit.language_model import product_sums as sums
from hullkit.native import kernels
from torch import Tensor

SHAPES = ((2, 63, 129), (1, 150, 64), (3, 12, 5))  # prompts, candidates, d
TOTAL = 9
CAPS = (None, 5)
RULES = [(v, 1.0) for v in ("vanilla", "away", "pairwise", "fully_corrective")]
RULES += [(v, 0.4) for v in ("vanilla", "pairwise", "fully_corrective")]

Problem = tuple[Tensor, Tensor, dict[str, Any]]


def problems(device: str) -> Iterator[Problem]:
    for dtype in DTYPES:
        for batch, n, d in SHAPES:
            pool, query = (tensor.to(device) for tensor in problem(batch, n, d, dtype))
            yield pool, query, {}
            unaligned = torch.zeros(batch, n, d + 3, dtype=dtype, device=device)[:, :, 1 : d + 1]
            lengths = torch.arange(n, n - batch, -1, device=device)
            yield unaligned.copy_(pool), query, {"lengths": lengths}
            candidates = torch.arange(n, device=device).flip(0).repeat(batch, 1)
            candidates[:, 1::5] = -1
            yield pool[0], query, {"candidates": candidates}


def low_rank(slots: int, device: str) -> None:
    """Forward and backward of three layers, with sums in several parts."""
    wide, rank = 700, 16
    shapes = ((slots, 90, wide), (slots, 90, wide), (slots, rank, wide), (slots, wide, rank))
    y, x, a, b = (torch.randn(shape, device=device) for shape in shapes)
    parts = []
    for shrunk in products.shrink(x, [a] * products.MOST_LAYERS, 1.0):
        inner = products.expand(y, shrunk, b)
        of_b = products.ExpandGradient(y, b, inner, torch.empty_like(b))
        [d_inner] = products.expand_gradients([of_b], 1.0)
        parts.append(products.ShrinkGradient(a, d_inner, torch.empty_like(a)))
    products.shrink_gradients(x, parts, torch.empty_like(x), fresh=True)


def product_sums(transposed: bool, device: str) -> None:
    """Several tiles a block, at the edges of their matrices and slots."""
    x, d = torch.randn(90, 97, 200, device=device), torch.randn(90, 97, 264, device=device)
    weight, inner = torch.randn(1, 264, 200, device=device), torch.randn(90, 97, 8, device=device)
    a, b = torch.randn(90, 8, 200, device=device), torch.randn(90, 264, 8, device=device)
    terms = [(d, weight), (inner, a)] if transposed else [(x, weight), (inner, b)]
    halves = [sums.Term(*(t.bfloat16() for t in term)) for term in terms]
    problem = [sums.ProductSum(halves)]
    if sums.product_sums_take(problem, transposed):
        sums.product_sums(problem, transposed)


def adam_products(dtype: torch.dtype, device: str) -> None:
    """Several tiles a program, at the edges of their matrices."""
    if kernels.adam_product_usable(torch.device(device)):
        Matrices(dtype, [(2056, 2312), (136, 40)], tokens=77).update(3, fused=True)


def run(device: str, part: int = 0, of: int = 1) -> int:
    """The number of calls."""
    calls = 0

    def call(function: Any, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        function(*arguments, **options)
        calls += 1

    for pool, query, where in itertools.islice(problems(device), part, None, of):
        call(hullkit.lmo, pool, query, **where)
        call(hullkit.knn, pool, query, 4, **where)
        call(hullkit.duplicates, pool, eps=0.05, **where)
        for cap in CAPS:
            options: dict[str, Any] = {"max_multiplicity": cap}
            call(hullkit.select, pool, query, TOTAL, **options, **where)
            call(hullkit.select, pool, query, "auto", max_total=TOTAL, **options, **where)
        call(hullkit.sift, pool, query, TOTAL, **where)
        call(hullkit.sift, pool, torch.stack([query, query.flip(0)], 1), TOTAL, **where)
        for variant, weight in RULES:
            options = {"variant": variant, "max_weight": weight, "max_iters": 12, "gap_tol": 1e-6}
            call(hullkit.frank_wolfe, pool, query, **options, **where)
        call(hullkit.apportion, torch.rand_like(query), TOTAL)
    large = ((600, hullkit.sift), (4500, hullkit.select))  # beyond a block; beyond 4096
    for n, function in itertools.islice(large, part, None, of):
        pool, query = (tensor.to(device) for tensor in problem(1, n, 32, torch.float32))
        call(function, pool[0], query, 5)
    for slots in itertools.islice((1, 3), part, None, of):
        call(low_rank, slots, device)
    for transposed in itertools.islice((False, True), part, None, of):
        call(product_sums, transposed, device)
    for dtype in itertools.islice((torch.bfloat16, torch.float32), part, None, of):
        call(adam_products, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    part, _, of = (sys.argv[1:] or ["0/1"])[-1].partition("/")
    print(run("cuda", int(part), int(of)), "calls")
