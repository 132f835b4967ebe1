# SPDX-License-Identifier: Apache-2.0
"""Ways to finetune: the published procedure's own loop, and hullkit in several precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import hullkit
import torch
from torch import Tensor, nn

from bench.harness import texts
from bench.rivals import published
from bench.ttft.rules import Cell, Rule

LORA_RANK = 16


class Hullkit:
    """One tuner for all cells: its captured passes stay, its settings change between queries."""

    backend: str | None = None  # of the selection: the kernels

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.tuner = hullkit.TestTimeFinetuner(model, precision=precision)

    def adapted(
        self, examples: list[Tensor], counts: list[int], rule: Rule, cell: Cell
    ) -> AbstractContextManager[nn.Module]:
        self.tuner.lr, self.tuner.betas = cell.lr, cell.betas
        self.tuner.refresh_interval = rule.refresh_interval
        return self.tuner.adapted(examples, counts)

    def warm_up(self, lengths: range) -> None:
        self.tuner.warmup(lengths)


class Published:
    """Padded, with cloned gradients and dropout, restored from the host; selection in NumPy."""

    backend: str | None = "reference"

    def __init__(self, model: nn.Module, max_length: int) -> None:
        self._model, self._max_length = model, max_length
        self._state = published.base_state(model)

    @contextmanager
    def adapted(
        self, examples: list[Tensor], counts: list[int], rule: Rule, cell: Cell
    ) -> Iterator[nn.Module]:
        published.finetune(
            self._model,
            examples,
            counts,
            refresh_interval=rule.refresh_interval,
            lr=cell.lr,
            max_length=self._max_length,
        )
        yield self._model
        published.restore(self._model, self._state)

    def warm_up(self, lengths: range) -> None:
        example = torch.zeros(min(lengths.start, self._max_length), dtype=torch.int64)
        published.finetune(self._model, [example], [1], max_length=self._max_length)
        published.restore(self._model, self._state)


PRECISIONS = {"float32": "float32", "bf16": "bf16", "bfloat16": "float32", "lora": "bf16"}
PATHS = ("published", *PRECISIONS)


def opened(path: str, folder: Path, device: torch.device, max_length: int) -> Hullkit | Published:
    """path: "published"; "float32"; "bf16": float32 weights, bf16 passes; "bfloat16": weights;
    "lora": adapters in all linear layers, bf16 passes."""
    model = texts.language_model(folder, device)
    if path == "published":
        return Published(model, max_length)
    if path == "bfloat16":
        model = model.to(torch.bfloat16)
    if path == "lora":
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    return Hullkit(model.eval(), PRECISIONS[path])
