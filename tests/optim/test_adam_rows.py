# SPDX-License-Identifier: Apache-2.0
"""Updates of a matrix's rows again, once their gradients are complete: the bits of one update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hullkit.finetune.rounding import moment_dtype
from hullkit.optim import _kernels
from hullkit.optim._kernels import SavedRows
from hullkit.optim._record import BROKEN, LIMIT, AdamOptions, TensorRow, flags_of
from hullkit.optim._tensor_table import TensorTable
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
OPTIONS = AdamOptions(1e-2, 0.9, 0.99, _kernels.log2(0.9), _kernels.log2(0.99), 1e-8, decay=0.1)
CAPACITY, STEPS = 4, 3


class Matrix:
    """Two tensors in one table, the second one a matrix [V, D], and what Adam keeps of them."""

    def __init__(self, dtype: torch.dtype, rows: int, width: int) -> None:
        random = torch.Generator().manual_seed(0)
        shapes = ((7,), (rows, width))
        self.params = [torch.randn(s, generator=random).to(DEVICE, dtype) for s in shapes]
        kind = moment_dtype(dtype)
        self.firsts = [p.to(kind) / 8 for p in self.params]
        self.seconds = [p.to(kind).square() / 64 for p in self.params]
        self.steps = torch.full((2,), 5.0, device=DEVICE)
        self.copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in self.params]
        addresses = zip(self.params, self.firsts, self.seconds, self.steps, strict=True)
        table = [
            TensorRow(*(t.data_ptr() for t in tensors), tensors[0].numel(), flags_of(salt))
            for salt, tensors in enumerate(addresses)
        ]
        self.table = TensorTable(table, DEVICE, triton=True)
        self.copies_at = torch.tensor([c.data_ptr() for c in self.copies], device=DEVICE)
        math = _kernels.arithmetic_dtype(dtype)
        self.coefficients = torch.zeros(2, CAPACITY, 2, dtype=math, device=DEVICE)
        self.dtypes = (dtype, dtype, kind)

    def options(self, gradients: list[Tensor], copied: bool) -> tuple[tuple[Any, ...], Tensor]:
        record = self.table.record([g.data_ptr() for g in gradients], OPTIONS, seed=3).clone()
        record[LIMIT] = STEPS
        rest = (self.dtypes, CAPACITY, self.params[0].dtype is torch.bfloat16)
        return (*rest, self.copies_at if copied else None), record

    def all(self) -> list[Tensor]:
        return [*self.params, *self.firsts, *self.seconds, *self.copies]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 700])
def test_rows_again(dtype: torch.dtype, width: int, copied: bool) -> None:
    ids = torch.tensor([3, 11, 3, 0, 19], device=DEVICE)
    random = torch.Generator().manual_seed(1)
    shapes = ((7,), (20, width))
    whole = [torch.randn(s, generator=random).to(DEVICE, dtype) for s in shapes]
    at_once, in_two = Matrix(dtype, 20, width), Matrix(dtype, 20, width)
    for matrix, gradients in ((at_once, whole), (in_two, [g.clone() for g in whole])):
        rest, record = matrix.options(gradients, copied)
        _kernels.adam_coefficients_(matrix.table, record, matrix.coefficients, CAPACITY)
        arguments = (record, matrix.coefficients, *rest)
        if matrix is at_once:
            _kernels.adam_chunks_(matrix.table, matrix.table.chunks, *arguments)
            continue
        gradients[1][ids] = 1e3  # incomplete ones, whatever they are
        kept = (matrix.params[1], matrix.firsts[1], matrix.seconds[1])
        rows = SavedRows(ids, *(t.index_select(0, ids) for t in kept))
        _kernels.adam_chunks_(matrix.table, matrix.table.chunks, *arguments)
        gradients[1].copy_(whole[1])
        _kernels.adam_rows_(matrix.table, 1, rows, *arguments)
    for one, other in zip(at_once.all(), in_two.all(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(at_once.params[1], Matrix(dtype, 20, width).params[1])


def test_a_gradient_that_is_not_finite_is_told() -> None:
    matrix, ids = Matrix(torch.float32, 20, 5), torch.tensor([4], device=DEVICE)
    gradients = [torch.ones_like(p) for p in matrix.params]
    gradients[1][4, 2] = torch.nan
    rest, record = matrix.options(gradients, False)
    kept = (matrix.params[1], matrix.firsts[1], matrix.seconds[1])
    rows = SavedRows(ids, *(t.index_select(0, ids) for t in kept))
    _kernels.adam_coefficients_(matrix.table, record, matrix.coefficients, CAPACITY)
    _kernels.adam_rows_(matrix.table, 1, rows, record, matrix.coefficients, *rest)
    assert int(record[BROKEN]) == 1
