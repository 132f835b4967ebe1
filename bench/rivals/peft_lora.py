# SPDX-License-Identifier: Apache-2.0
"""A low-rank adapter trained by PEFT and torch alone: what many prompts are measured against.

`Eager` is what somebody without kernels writes. `Captured` is the fastest that torch gives without
kernels of one's own: adapters in bfloat16, and a CUDA graph each for the pass and the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LR = 5e-5


class Eager:
    """Trains the adapters on each example, one gradient for all its updates, and puts them back.
    A call returns the losses of its passes."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.train()  # as loops do; PEFT's dropout is 0
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.first = [p.detach().clone() for p in self.trained]
        self.adam = self.new_adam()

    def __call__(self, examples: Sequence[Tensor], counts: Sequence[int]) -> list[float]:
        self.reset()
        losses = []
        for ids, count in zip(examples, counts, strict=True):
            losses.append(self.learn(ids.to(self.trained[0].device)[None]))
            for _ in range(count):
                self.update()
        return [float(loss) for loss in losses]

    def new_adam(self, **options: Any) -> torch.optim.Adam:
        return torch.optim.Adam(self.trained, lr=LR, fused=self.trained[0].is_cuda, **options)

    def reset(self) -> None:
        with torch.no_grad():
            for parameter, first in zip(self.trained, self.first, strict=True):
                parameter.copy_(first)
        self.adam = self.new_adam()

    def learn(self, ids: Tensor) -> Tensor:
        self.adam.zero_grad()
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.adam.step()


class Captured(Eager):
    """For texts of one length, on a GPU."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        super().__init__(model)
        self.adam = self.new_adam(capturable=True)
        self.ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.trained[0].device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                super().learn(self.ids)
                super().update()
        torch.cuda.synchronize()
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[0], stream=stream):
            self.loss = super().learn(self.ids)
        with torch.cuda.graph(self.graphs[1], stream=stream):
            super().update()

    def reset(self) -> None:
        with torch.no_grad():
            for parameter, first in zip(self.trained, self.first, strict=True):
                parameter.copy_(first)
                for tensor in self.adam.state[parameter].values():
                    tensor.zero_()

    def learn(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.graphs[0].replay()
        return self.loss.clone()

    def update(self) -> None:
        self.graphs[1].replay()
