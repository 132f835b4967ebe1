# SPDX-License-Identifier: Apache-2.0
"""Small queries for PromptBatch, on the GPU where there is one."""

from __future__ import annotations

from typing import Any

import hullkit
import torch
from _models import VOCABULARY
from hullkit.prompt_batch import Score
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANK, LR = 16, 1e-2  # a rank at which a GPU uses the kernels
# In full float32 every text has a pass of its own. With this, slots share passes, on a CPU in the
# same arithmetic.
TOGETHER = {"precision": "tf32"}
ROUNDING = 1e-5 if DEVICE.type == "cpu" else 2e-2  # relative, of a loss
PRECISIONS = ("float32", "tf32")


def text(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator)


def query(seed: int) -> hullkit.Query:
    """Two or three examples of mixed lengths and counts, and a text to score."""
    examples = [text(5 + (7 * seed + 11 * i) % 40, 100 * seed + i) for i in range(2 + seed % 2)]
    counts = [1 + (seed + i) % 4 for i in range(len(examples))]
    return hullkit.Query(examples, counts, Score(text(20, 1000 + seed)))


def batch_of(model: nn.Module, slots: int, **options: Any) -> hullkit.PromptBatch:
    settings: dict[str, Any] = {"rank": RANK, "alpha": 6, "lr": LR}
    return hullkit.PromptBatch(model, slots=slots, **settings | options)


def is_fresh(of: hullkit.PromptBatch, slot: int) -> bool:
    """Whether a slot has the factors of the batch's seed, and no moments."""
    factors, seed = of._factors, of.seed
    return torch.equal(factors.params[slot], factors.fresh(seed)) and not bool(
        factors.exp_avg[slot].any() or factors.exp_avg_sq[slot].any()
    )
