# SPDX-License-Identifier: Apache-2.0
"""Test-time finetuning with gradient reuse, written out: what the fast forms must agree with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .schedule import updates


def finetune(
    model: nn.Module,
    examples: Sequence[Tensor],
    counts: Sequence[int],
    *,
    lr: float = 5e-5,
    refresh_interval: int = 2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> list[float]:
    """Finetune `model` in place, in its own dtype, with one update per unit of `counts`.

    Adam of Kingma & Ba (arXiv 1412.6980, algorithm 1), no dropout.

    Args:
        model: called with ids `(1, T)`; returns logits `(1, T, V)`, or an object that has them.
        examples: token ids `(T,)` int64 each, on the model's device.
        counts: updates of each example, >= 0.
        lr, betas, eps: Adam's.
        refresh_interval: the most updates with one gradient, >= 1.
    Returns:
        The loss of every pass, in nats per token.

    >>> import torch, hullkit.reference as reference
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> len(reference.finetune(model, [torch.tensor([1, 2, 3])], [3]))
    2
    """
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    m = [torch.zeros_like(p) for p in parameters]
    v = [torch.zeros_like(p) for p in parameters]
    t = [0] * len(parameters)
    cached: list[Tensor | None] = []
    losses = []
    for example, refresh in updates(counts, refresh_interval):
        if refresh:
            ids = examples[example]
            output = model(ids[None])
            logits = output if isinstance(output, Tensor) else output.logits
            log_p = torch.log_softmax(logits[0, :-1], dim=-1)
            loss = -log_p[torch.arange(len(ids) - 1, device=ids.device), ids[1:]].mean()
            # A parameter that the loss does not depend on has none, and is not updated.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            cached = [None if g is None else g.clone() for g in gradients]
            losses.append(loss.item())
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, cached, strict=True)):
                if g is None:
                    continue
                t[i] += 1
                m[i] = betas[0] * m[i] + (1 - betas[0]) * g
                v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
                m_hat = m[i] / (1 - betas[0] ** t[i])
                v_hat = v[i] / (1 - betas[1] ** t[i])
                p.sub_(lr * m_hat / (v_hat.sqrt() + eps))
    return losses
