# SPDX-License-Identifier: Apache-2.0
"""The published finetuning procedure, written naively: what TestTimeFinetuner is measured against.

Eager passes over sequences padded to max_length, all gradients cloned for reuse, torch's Adam as it
comes, base weights put back from a state_dict in host memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_LENGTH = 1024


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """What `restore` needs, in host memory, made once."""
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def finetune(
    model: nn.Module,
    examples: list[Tensor],
    counts: list[int],
    *,
    refresh_interval: int = 2,
    lr: float = 5e-5,
    max_length: int | None = MAX_LENGTH,
    dropout: bool = True,
) -> None:
    """In place. max_length None: no padding. dropout: as published; off to compare results."""
    device = next(model.parameters()).device
    model.train(dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for ids, count in zip(examples, counts, strict=True):
        length = len(ids) if max_length is None else max_length
        padded = torch.zeros(1, length, dtype=torch.int64, device=device)
        padded[0, : len(ids)] = ids
        mask = torch.zeros_like(padded)
        mask[0, : len(ids)] = 1
        labels = padded.masked_fill(mask == 0, -100)
        cached: list[Tensor | None] = []
        for update in range(count):
            if update % refresh_interval == 0:
                outputs = model(input_ids=padded, attention_mask=mask, labels=labels)
                loss = outputs.loss  # both names live on, as they do in such a loop
                loss.backward()
                cached = [
                    None if p.grad is None else p.grad.detach().clone() for p in model.parameters()
                ]
            else:
                for parameter, gradient in zip(model.parameters(), cached, strict=True):
                    parameter.grad = None if gradient is None else gradient.clone()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()


def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)
