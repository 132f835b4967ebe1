# SPDX-License-Identifier: Apache-2.0
"""Selections and optimizers on several CUDA streams at once: no kernel meets another's memory."""

from __future__ import annotations

import hullkit
import pytest
import torch
from hullkit import optim
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]
STREAMS, ROUNDS = 3, 20


class Work:
    """What one stream does again and again; inputs are of its own."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        self.pool, self.query = normal(16, 200, 129), normal(16, 129)
        self.weights = [normal(129, 65), normal(1000)]
        self.gradients = [normal(129, 65), normal(1000)]

    def __call__(self) -> list[Tensor]:
        selected = hullkit.select(self.pool, self.query, 50)
        nearest = hullkit.knn(self.pool, self.query, 7)
        found = [*selected[:3], *nearest, *hullkit.sift(self.pool, self.query, 20)[:2]]
        found.append(hullkit.duplicates(self.pool, eps=0.9))
        for make in (optim.AdamW, optim.SGD):
            parameters = [nn.Parameter(weight.clone()) for weight in self.weights]
            optimizer = make(parameters, lr=0.1)
            for parameter, gradient in zip(parameters, self.gradients, strict=True):
                parameter.grad = gradient
            optimizer.step(num_steps=3)
            optimizer.step()
            found += [parameter.detach() for parameter in parameters]
        return found


def test_three_streams_have_the_bits_of_one() -> None:
    works = [Work(seed) for seed in range(STREAMS)]
    expected = [work() for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for stream, work, results in zip(streams, works, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(work())
    torch.cuda.synchronize()
    for right, results in zip(expected, found, strict=True):
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(right, result, strict=True))
