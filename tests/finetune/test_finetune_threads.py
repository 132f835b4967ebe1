# SPDX-License-Identifier: Apache-2.0
"""Sixteen threads, each with selections, an optimizer and a tuner of its own."""

from __future__ import annotations

import threading

import hullkit
import pytest
import torch
from _models import COUNTS, VOCABULARY, gpt2
from hullkit import optim
from hullkit.finetune import TestTimeFinetuner
from torch import Tensor, nn

THREADS = 16
ROUNDS = 2


class Worker:
    """One thread's work; `result` is every tensor that came of it."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(4, 63, 33, generator=generator)
        self.query = torch.randn(4, 33, generator=generator)
        self.parameter = nn.Parameter(torch.randn(17, 9, generator=generator))
        self.parameter.grad = torch.randn(17, 9, generator=generator)
        self.optimizer = optim.AdamW([self.parameter], lr=0.1)
        self.model = gpt2()
        self.examples = [
            torch.randint(VOCABULARY, (9,), generator=generator) for _ in range(len(COUNTS))
        ]
        self.tuner = TestTimeFinetuner(self.model, lr=0.01)
        self.base = [weight.clone() for weight in self.model.parameters()]
        self.result: list[Tensor] = []
        self.failure: BaseException | None = None

    def work(self) -> None:
        try:
            for _ in range(ROUNDS):
                self.result += hullkit.select(self.pool, self.query, 12)[:3]
                self.result += hullkit.sift(self.pool, self.query, 12)[:2]
                self.optimizer.step(num_steps=3)
                self.result.append(self.parameter.detach().clone())
                with self.tuner.adapted(self.examples, COUNTS) as model:
                    self.result += [weight.detach().clone() for weight in model.parameters()]
                for weight, before in zip(self.model.parameters(), self.base, strict=True):
                    assert torch.equal(weight, before)
        except BaseException as failure:
            self.failure = failure


@pytest.mark.usefixtures("one_thread")
def test_sixteen_threads_give_the_bits_of_one() -> None:
    alone = [Worker(seed) for seed in range(THREADS)]
    for worker in alone:
        worker.work()
        assert worker.failure is None, worker.failure
    together = [Worker(seed) for seed in range(THREADS)]
    threads = [threading.Thread(target=worker.work) for worker in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a call hangs"
    for one, other in zip(alone, together, strict=True):
        assert other.failure is None, other.failure
        for expected, result in zip(one.result, other.result, strict=True):
            assert torch.equal(expected, result)
    assert torch.is_grad_enabled()
