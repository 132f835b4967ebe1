# SPDX-License-Identifier: Apache-2.0
"""Matrices whose gradients are products, and their updates with and without these gradients."""

from __future__ import annotations

import torch
from hullkit.finetune.base_weights import adam_options
from hullkit.optim import _kernels
from hullkit.optim._products import adam_product_chunks_, aligned, factors_of, product_chunks
from hullkit.optim._record import BROKEN, LIMIT, SEED, TensorRow, flags_of
from hullkit.optim._tensor_table import TensorTable
from torch import Tensor

CAPACITY = 6
BETAS = (0.9, 0.999)


class Matrices:
    """Parameters with moments, their gradients' factors, and a record as a graph reads it."""

    def __init__(self, dtype: torch.dtype, shapes: list[tuple[int, int]], tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def integers(*size: int) -> Tensor:
            values = torch.randint(-3, 4, size, generator=generator)
            return values.to("cuda", torch.bfloat16)

        self.dtype, self.shapes = dtype, shapes
        moment = torch.bfloat16 if dtype is torch.float16 else dtype
        make = [torch.randn(shape, generator=generator) for shape in shapes]
        self.params = [values.to("cuda", dtype) for values in make]
        self.moments = [(0.1 * p).to(moment) for p in self.params]
        self.squares = [(0.1 * p).square().to(moment) for p in self.params]
        self.copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in self.params]
        # Columns are cut off, so that rows lie apart.
        self.a = [integers(tokens, rows + 8)[:, 8:] for rows, _ in shapes]
        self.b = [integers(tokens, columns) for _, columns in shapes]
        self.steps = torch.full((len(shapes),), 3.0, device="cuda")

    def table(self) -> TensorTable:
        own = zip(self.params, self.moments, self.squares, self.steps, strict=True)
        rows = [
            TensorRow(*(t.data_ptr() for t in tensors), tensors[0].numel(), flags_of(77 + i))
            for i, tensors in enumerate(own)
        ]
        return TensorTable(rows, torch.device("cuda", 0), triton=True)

    def update(self, limit: int, fused: bool, stochastic: bool = False, eps: float = 1e-8) -> bool:
        """Whether a gradient was not finite."""
        table = self.table()
        products = [(a.mT @ b) for a, b in zip(self.a, self.b, strict=True)]
        record = table.record([g.data_ptr() for g in products], adam_options(1e-2, BETAS, eps))
        record = record.clone()
        record[LIMIT], record[SEED] = limit, 1 << 40 | 5
        size = (len(self.shapes), CAPACITY, 2)
        coefficients = torch.zeros(size, dtype=torch.float32, device="cuda")
        _kernels.adam_coefficients_(table, record, coefficients, CAPACITY)
        copies = None
        if self.dtype is not torch.bfloat16:
            copies = torch.tensor([c.data_ptr() for c in self.copies], device="cuda")
        if fused:
            pairs = [(aligned(a), aligned(b)) for a, b in zip(self.a, self.b, strict=True)]
            factors = torch.tensor([factors_of(*pair) for pair in pairs], device="cuda")
            chunks = product_chunks(self.shapes, 0, table.device)
            adam_product_chunks_(
                table, chunks, factors, record, coefficients, self.dtype, stochastic, copies
            )
        else:
            dtypes = (self.dtype, torch.bfloat16, self.moments[0].dtype)
            _kernels.adam_chunks_(
                table, table.chunks, record, coefficients, dtypes, CAPACITY, stochastic, copies
            )
        torch.cuda.synchronize()
        return bool(record[BROKEN])

    def state(self) -> list[Tensor]:
        copies = [] if self.dtype is torch.bfloat16 else self.copies
        return [t.clone() for t in (*self.params, *self.moments, *self.squares, *copies)]
