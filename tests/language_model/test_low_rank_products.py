# SPDX-License-Identifier: Apache-2.0
"""Shrink, expand and their gradients: layers that read one input, slots that lie apart."""

from __future__ import annotations

import pytest
import torch
from hullkit.language_model.low_rank_products import (
    MOST_LAYERS,
    ExpandGradient,
    Inner,
    ShrinkGradient,
    expand,
    expand_gradients,
    shrink,
    shrink_gradients,
)
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
SCALE = 1.5


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def rows_of_memory(slots: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """(K, *shape), a part of each row of a longer memory."""
    size = shape[0] * shape[1]
    return random(slots, size + 37, dtype=dtype)[:, 8 : size + 8].unflatten(1, shape)


def parts_of_memory(slots: int, shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """(K, *shape) of each, all in one row of memory for each slot."""
    sizes = [rows * columns for rows, columns in shapes]
    memory = random(slots, sum(sizes) + 37, dtype=dtype)[:, :-37]
    return [
        part.unflatten(1, shape) for part, shape in zip(memory.split(sizes, 1), shapes, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("layers", range(1, MOST_LAYERS + 1))
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("slots", "rows", "columns", "wide", "rank"),
    [(1, 70, 300, 24, 16), (3, 33, 70, 260, 5), (2, 1, 9, 5, 1)],
)
def test_layers_that_read_one_input(
    slots: int,
    rows: int,
    columns: int,
    wide: int,
    rank: int,
    fresh: bool,
    layers: int,
    backend: str | None,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    x = rows_of_memory(slots, rows, columns, dtype=dtype)
    a = [rows_of_memory(slots, rank, columns, dtype=dtype) for _ in range(layers)]
    outputs = (wide, columns, 2 * wide)[:layers]
    b = parts_of_memory(slots, [(width, rank) for width in outputs], dtype)
    d = [random(slots, rows, width, dtype=dtype) for width in outputs]
    y, d_x = [2.0 * t for t in d], x + 1.0
    wanted = [t.double() for t in y] + [d_x.double() * (not fresh)]
    d_a = [torch.full_like(t, torch.nan, dtype=torch.float32) for t in a]
    d_b = parts_of_memory(slots, [(width, rank) for width in outputs], torch.float32)
    shrunk = shrink(x, a, SCALE, backend)
    inner = [expand(*own) for own in zip(y, shrunk, b, strict=True)]
    of_b = [ExpandGradient(*own) for own in zip(d, b, inner, d_b, strict=True)]
    d_inner = expand_gradients(of_b, SCALE)
    parts = [ShrinkGradient(*own) for own in zip(a, d_inner, d_a, strict=True)]
    shrink_gradients(x, parts, d_x, fresh, backend)

    def close(ours: Tensor, theirs: Tensor) -> None:
        # Products of rounded products, each sum in float32 and one more rounding.
        unit = torch.finfo(dtype).eps * float(theirs.abs().max())
        assert float((ours.double() - theirs).abs().max()) <= 8.0 * unit

    for i in range(layers):
        wide_a, wide_b, wide_d = (t.double() for t in (a[i], b[i], d[i]))
        own = SCALE * x.double() @ wide_a.mT
        d_own = SCALE * wide_d @ wide_b
        close(y[i], wanted[i] + own @ wide_b.mT)
        close(d_b[i], wide_d.mT @ own)
        close(d_a[i], d_own.mT @ x.double())
        wanted[-1] = wanted[-1] + d_own @ wide_a
    close(d_x, wanted[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("layers", range(1, MOST_LAYERS + 1))
@pytest.mark.parametrize(
    ("slots", "rows", "columns", "rank"), [(1, 140, 700, 16), (3, 70, 300, 16), (2, 1, 9, 16)]
)
def test_inner_without_expand(
    slots: int, rows: int, columns: int, rank: int, layers: int, backend: str | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Sums in several parts and in one. Then d_a alone: whoever multiplies a makes d_x as well."""
    torch.manual_seed(0)
    x = random(slots, rows, columns, dtype=dtype)
    a = [rows_of_memory(slots, rank, columns, dtype=dtype) for _ in range(layers)]
    b = [rows_of_memory(slots, 20, rank, dtype=dtype) for _ in range(layers)]
    d = random(slots, rows, 20, dtype=dtype)
    counters = torch.zeros(MOST_LAYERS, slots, rows, dtype=torch.int32, device=DEVICE)
    # A sum of up to 700 terms rounds as often, by half a unit either way: 13 units, and a last one.
    for _ in range(2):  # counters are as they were
        for factor, shrunk in zip(a, shrink(x, a, SCALE, backend, counters), strict=True):
            assert not shrunk.in_parts
            assert shrunk.values.dtype is dtype
            wanted = SCALE * x.double() @ factor.double().mT
            unit = torch.finfo(dtype).eps * float(wanted.abs().max())
            assert float((shrunk.values.double() - wanted).abs().max()) <= 16.0 * unit
        assert not counters.any()
    shrunk = shrink(x, a, SCALE, backend, counters)
    ups = [
        ExpandGradient(d, up, Inner(own.values, own.finished), None)
        for up, own in zip(b, shrunk, strict=True)
    ]
    d_inner = expand_gradients(ups, SCALE)
    assert not counters.any()
    d_a = [torch.full_like(factor, torch.nan, dtype=torch.float32) for factor in a]
    parts = [ShrinkGradient(*part) for part in zip(a, d_inner, d_a, strict=True)]
    shrink_gradients(x, parts, None, True, backend)
    for found, own in zip(d_a, d_inner, strict=True):
        wanted = own.double().mT @ x.double()
        unit = torch.finfo(dtype).eps * float(wanted.abs().max())
        assert float((found.double() - wanted).abs().max()) <= 16.0 * unit
