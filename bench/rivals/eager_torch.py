# SPDX-License-Identifier: Apache-2.0
"""What somebody without kernels would write in torch: vectorised where torch allows, else loops."""

from __future__ import annotations

import torch
from torch import Tensor


def frank_wolfe(
    pool: Tensor, query: Tensor, max_support: int, max_iters: int = 250, tol: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Vanilla Frank-Wolfe: support by falling weight, weights."""
    vertex = int(torch.argmax(pool @ query))
    weights = torch.zeros(len(pool), dtype=pool.dtype)
    weights[vertex] = 1
    iterate = pool[vertex].clone()
    touched = {vertex}
    for _ in range(max_iters):
        residual = query - iterate
        if torch.linalg.vector_norm(residual) < tol:
            break
        vertex = int(torch.argmax(pool @ residual))
        direction = pool[vertex] - iterate
        length_squared = direction @ direction
        if length_squared < 1e-12:
            break
        step = torch.clamp(residual @ direction / length_squared, 0, 1)
        weights *= 1 - step
        weights[vertex] += step
        iterate += step * direction
        touched.add(vertex)
        if len(touched) >= max_support:
            break
    support = torch.tensor(sorted(touched))
    support = support[torch.argsort(-weights[support], stable=True)]
    return support, weights[support]


def round_multiplicities(
    support: Tensor, query: Tensor, weights: Tensor, total: int, exchange_passes: int = 2
) -> Tensor:
    """Floors, greedy completion, exchange; the losses of all moves of a unit in one batch."""
    size = len(support)
    units = support / total
    counts = torch.floor(total * weights / weights.sum()).to(torch.int64)
    residual = query - counts.to(units.dtype) @ units
    for _ in range(total - int(counts.sum())):
        best = int(torch.argmin((residual - units).square().sum(1)))
        counts[best] += 1
        residual = residual - units[best]
    for _ in range(exchange_passes):
        moved = False
        for i in torch.nonzero(counts > 0).flatten().tolist():
            j = 0
            while j < size and counts[i] > 0:
                losses = (residual + units[i] - units[j:]).square().sum(1)
                better = losses + 1e-14 < residual @ residual
                if i >= j:
                    better[i - j] = False
                if not bool(better.any()):
                    break
                j += int(torch.nonzero(better)[0])
                counts[i] -= 1
                counts[j] += 1
                residual = residual + units[i] - units[j]
                moved = True
                j += 1
        if not moved:
            break
    return counts


def apportion(weights: Tensor, total: int) -> Tensor:
    """Largest remainder."""
    quota = total * weights / weights.sum()
    counts = torch.floor(quota).to(torch.int64)
    order = torch.argsort(-(quota - counts), stable=True)
    counts[order[: total - int(counts.sum())]] += 1
    return counts
