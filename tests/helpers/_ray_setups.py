# SPDX-License-Identifier: Apache-2.0
"""What Ray's actors of the tests hold, and blocks for them."""

from __future__ import annotations

from typing import Any

import hullkit
import numpy as np
import torch
from hullkit.interop.ray import Setup


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64))


def choose(block: Any) -> Any:
    return [([torch.tensor([n, n + 1, n + 2])], [3]) for n in block["n"].tolist()]


def use(adapted: torch.nn.Module, row: Any) -> dict[str, Any]:
    return {"score": float(adapted[1].bias.detach().double().sum())}  # type: ignore[index]


def setup() -> Setup:
    torch.set_num_threads(1)
    return Setup(hullkit.TestTimeFinetuner(model(), lr=0.1), choose, use)


def block(*numbers: int) -> dict[str, Any]:
    return {"n": np.array(numbers), "text": np.array([str(n) for n in numbers])}


def low_rank(slots: int = 2) -> Setup:
    """A batch of several slots in place of the finetuner."""
    return setup()._replace(tuner=hullkit.PromptBatch(model(), slots=slots, rank=2, lr=0.1))
