# SPDX-License-Identifier: Apache-2.0
"""Low-rank products of K slots, fused and by baddbmm: `python -m bench.ops.lora_products`.

y + s (x A^T) B^T and all its gradients at 400 rows a slot in bfloat16, alone, and as part of a
linear layer. Each provider is a CUDA graph, so that launches cost all the same. No time without a
green check of results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from hullkit.language_model.low_rank_layers import Adapted, Part, leave, outputs
from hullkit.language_model.low_rank_products import (
    MOST_LAYERS,
    ExpandGradient,
    ShrinkGradient,
    expand,
    expand_gradients,
    shrink,
    shrink_gradients,
)
from hullkit.language_model.products import SharedInput
from torch import Tensor

from bench.harness.graphs import compare

ROWS, SCALE = 400, 1.0


def problem(slots: int, width: int, rank: int) -> list[Tensor]:
    """y, x, d, d_x (K, T, D), a (K, R, D), b (K, D, R)."""
    wide = [torch.randn(slots, ROWS, width, device="cuda") for _ in range(4)]
    thin = [torch.randn(slots, rank, width, device="cuda") / width**0.5]
    thin += [torch.randn(slots, width, rank, device="cuda") / rank**0.5]
    return [t.to(torch.bfloat16) for t in (*wide, *thin)]


def fused(tensors: list[Tensor]) -> list[Tensor]:
    y, x, d, d_x, a, b = tensors
    [shrunk] = shrink(x, [a], SCALE)
    inner = expand(y, shrunk, b)
    d_a, d_b = torch.empty_like(a), torch.empty_like(b)
    [d_inner] = expand_gradients([ExpandGradient(d, b, inner, d_b)], SCALE)
    shrink_gradients(x, [ShrinkGradient(a, d_inner, d_a)], d_x, fresh=False)
    return [y, d_a, d_b]


def by_baddbmm(tensors: list[Tensor]) -> list[Tensor]:
    y, x, d, d_x, a, b = tensors
    inner = torch.bmm(x, a.mT)
    out = torch.baddbmm(y, inner, b.mT, alpha=SCALE)
    d_b = torch.bmm(d.mT, inner)
    d_inner = torch.bmm(d, b)
    d_a = torch.bmm(d_inner.mT, x)
    d_x.baddbmm_(d_inner, a)
    return [out, d_a, d_b]


def fused_layer(tensors: list[Tensor], weight: Tensor, counters: Tensor) -> list[Tensor]:
    """As a pass computes it; where no kernel does, by products one after the other."""
    _, x, d, _, a, b = tensors
    layer = Adapted(weight, None, a, b)
    [made] = outputs(x, x.shape[:-1], [layer], SCALE, lambda _: counters, None)
    if made is None:
        [shrunk] = shrink(x, [a], SCALE)
        y = x @ weight.t()
        inner = expand(y, shrunk, b)
    else:
        y, inner = made
    d_a, d_b = torch.empty_like(a), torch.empty_like(b)
    shared = SharedInput(x.dtype)
    part = Part(
        x=x, d=d, adapted=layer, inner=inner, scale=SCALE, d_inner=None, d_a=d_a, d_b=d_b,
        backend=None,
    )  # fmt: skip
    leave(shared, part)
    d_x = shared.take()
    assert d_x is not None
    return [y, d_a, d_b, d_x.view(x.shape)]


def layer_alone(tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    _, x, d, *_ = tensors
    return [x @ weight.t(), d @ weight]


def layer_by_baddbmm(tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    _, x, d, _, a, b = tensors
    y, d_x = layer_alone(tensors, weight)
    return [*by_baddbmm([y, x, d, d_x, a, b]), d_x]


def check(tensors: list[Tensor], *runs: Callable[[list[Tensor]], list[Tensor]]) -> None:
    results = [run([t.clone() for t in tensors]) for run in runs]
    for one, other in zip(*results, strict=True):
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        if not error <= 2**-5:
            raise AssertionError(f"results differ by {float(error):.3g}, relative")


def run_case(slots: int, width: int, rank: int, rounds: int, out: Path | None) -> None:
    tensors = problem(slots, width, rank)
    check(tensors, fused, by_baddbmm)
    shape = f"K={slots} T={ROWS} d={width} r={rank} forward and backward"
    settings = {"rounds": rounds, "out": out}
    ways = {
        "fused": partial(fused, [t.clone() for t in tensors]),
        "baddbmm": partial(by_baddbmm, [t.clone() for t in tensors]),
    }
    compare("low-rank products", "bfloat16", shape, ways, **settings)  # type: ignore[arg-type]
    weight = torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    counters = torch.zeros(MOST_LAYERS, slots, ROWS, dtype=torch.int32, device="cuda")
    whole = partial(fused_layer, weight=weight, counters=counters)
    check(tensors, whole, partial(layer_by_baddbmm, weight=weight))
    ways = {
        "fused layer": partial(whole, tensors),
        "baddbmm layer": partial(layer_by_baddbmm, tensors, weight),
        "layer alone": partial(layer_alone, tensors, weight),
    }
    compare("low-rank layers", "bfloat16", shape, ways, **settings)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", default="1,8,32,64")
    parser.add_argument("--widths", default="576,2048,4096")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=80.0, help="no case begins after so many")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    began = time.perf_counter()
    numbers = [
        [int(n) for n in text.split(",")]
        for text in (arguments.slots, arguments.widths, arguments.ranks)
    ]
    for slots, width, rank in (
        (k, d, r) for k in numbers[0] for d in numbers[1] for r in numbers[2]
    ):
        if time.perf_counter() - began > arguments.seconds:
            print(f"K={slots} d={width} r={rank}: left out")
            continue
        run_case(slots, width, rank, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
