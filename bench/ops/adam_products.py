# SPDX-License-Identifier: Apache-2.0
"""Updates that multiply their gradients, beside products and updates.

`python -m bench.ops.adam_products`: linear layers of published models, two updates with one
gradient over T tokens, as captured passes launch them; bfloat16 is rounded stochastically. Each
provider is a CUDA graph. Factors are small integers, so that both must leave the same bits; no
time without that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from hullkit.finetune.base_weights import adam_options
from hullkit.optim import _kernels
from hullkit.optim._products import adam_product_chunks_, factors_of, product_chunks
from hullkit.optim._record import LIMIT, TensorRow
from hullkit.optim._tensor_table import TensorTable

from bench.harness.graphs import compare

UPDATES, CAPACITY = 2, 64
ELEMENTS = 1 << 25  # of all matrices: their memory is several times a GPU's cache


class Case(NamedTuple):
    name: str
    rows: int
    columns: int
    dtype: torch.dtype  # of parameters and moments


CASES = (
    Case("SmolLM2-135M gate", 1536, 576, torch.float32),
    Case("GPT-2 124M MLP", 768, 3072, torch.float32),
    Case("Llama-3.2-1B query", 2048, 2048, torch.bfloat16),
    Case("Llama-3.2-1B gate", 8192, 2048, torch.bfloat16),
    Case("Mistral-7B down", 4096, 14336, torch.bfloat16),
)


class Problem:
    """Matrices with moments, factors of their gradients, and both ways to update them."""

    def __init__(self, case: Case, tokens: int) -> None:
        count = max(1, ELEMENTS // (case.rows * case.columns))
        shape = (case.rows, case.columns)
        device = torch.device("cuda", 0)
        self.dtype = case.dtype
        self._stochastic = case.dtype is torch.bfloat16
        # Parameters, both moments, bfloat16 copies.
        self.state = [torch.rand(count, *shape, device=device).to(case.dtype) for _ in range(3)]
        self.state.append(torch.zeros(count, *shape, dtype=torch.bfloat16, device=device))
        self._pairs = [
            [torch.randint(-2, 3, (tokens, n), device=device).bfloat16() for n in shape]
            for _ in range(count)
        ]
        self._gradients = [torch.empty_like(copy) for copy in self.state[3]]
        steps = torch.zeros(count, device=device)
        own = zip(*self.state[:3], steps, strict=True)
        rows = [TensorRow(*(t.data_ptr() for t in x), case.rows * case.columns) for x in own]
        self._table = TensorTable(rows, device, triton=True)
        addresses = [gradient.data_ptr() for gradient in self._gradients]
        self._record = self._table.record(addresses, adam_options(1e-3, (0.9, 0.999), 1e-8))
        self._record[LIMIT] = UPDATES
        self._coefficients = torch.zeros(count, CAPACITY, 2, device=device)
        _kernels.adam_coefficients_(self._table, self._record, self._coefficients, CAPACITY)
        copies = [copy.data_ptr() for copy in self.state[3]]
        self._copies = None if case.dtype is torch.bfloat16 else torch.tensor(copies, device=device)
        self._factors = torch.tensor([factors_of(*pair) for pair in self._pairs], device=device)
        self._chunks = product_chunks([shape] * count, 0, device)

    def fused(self) -> None:
        adam_product_chunks_(
            self._table, self._chunks, self._factors, self._record, self._coefficients,
            self.dtype, self._stochastic, self._copies,
        )  # fmt: skip

    def apart(self) -> None:
        for gradient, (a, b) in zip(self._gradients, self._pairs, strict=True):
            torch.mm(a.t(), b, out=gradient)
        dtypes = (self.dtype, torch.bfloat16, self.dtype)
        _kernels.adam_chunks_(
            self._table, self._table.chunks, self._record, self._coefficients, dtypes, CAPACITY,
            self._stochastic, self._copies,
        )  # fmt: skip

    def check(self) -> None:
        before = [tensor.clone() for tensor in self.state]
        results = []
        for run in (self.fused, self.apart):
            run()
            results.append([tensor.clone() for tensor in self.state])
            for tensor, own in zip(self.state, before, strict=True):
                tensor.copy_(own)
        if not all(map(torch.equal, *results)):
            raise AssertionError("expected the same bits of both providers, got others")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="100,400,500,1000")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    for case in CASES:
        for tokens in map(int, arguments.tokens.split(",")):
            problem = Problem(case, tokens)
            problem.check()
            shape = f"{case.name} {case.rows}x{case.columns} tokens={tokens} updates={UPDATES}"
            compare(
                "Adam products", str(case.dtype).removeprefix("torch."), shape,
                {"fused": problem.fused, "product and Adam": problem.apart},
                rounds=arguments.rounds, out=arguments.out, parts=len(problem.state[0]),
            )  # fmt: skip


if __name__ == "__main__":
    main()
