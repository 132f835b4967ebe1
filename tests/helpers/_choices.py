# SPDX-License-Identifier: Apache-2.0
"""Selections by number, and a data set of them that a spawned process can import."""

from __future__ import annotations

from typing import Any

import hullkit
import torch
from torch import Tensor
from torch.utils.data import Dataset


def _problem(seed: int) -> tuple[Tensor, Tensor]:
    pool = torch.randn(8, 63, 33, generator=torch.Generator().manual_seed(seed))
    return pool, pool.mean(1)


def choose(seed: int) -> list[Any]:
    torch.set_num_threads(2)
    pool, query = _problem(seed)
    return hullkit.select(pool, query, 12).indices.tolist()


class Choices(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, seed: int) -> Tensor:
        return torch.tensor(choose(seed))
