# SPDX-License-Identifier: Apache-2.0
"""Ways to finetune: the published procedure's own loop, hullkit in several precisions, and many
prompts at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hullkit
import torch
from torch import Tensor, nn

from bench.harness import texts
from bench.rivals import published
from bench.ttft.rules import Cell, Rule

LORA_RANK = LORA_ALPHA = 16


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


class Together:
    """An adapter for each of many prompts, trained together on one base."""

    backend: str | None = None

    def __init__(self, model: nn.Module, slots: int, precision: str) -> None:
        self.slots = slots
        self._batch = cache(
            lambda interval: hullkit.PromptBatch(
                model,
                slots=slots,
                rank=LORA_RANK,
                alpha=LORA_ALPHA,
                refresh_interval=interval,
                precision=precision,
            )
        )

    def stream(self, queries: Iterable[hullkit.Query], rule: Rule) -> list[Any]:
        """What each query's `then` returned."""
        values = []
        for answer in self._batch(rule.refresh_interval).map(queries):
            if answer.error is not None:
                raise answer.error
            values.append(answer.value)
        return values

    def warm_up(self, lengths: range) -> None:
        """A stream that is measured ran once before, and recorded its passes then."""


Way = Hullkit | Published | Together
PATHS = ("published", "float32", "bf16", "bfloat16", "lora", "many")


def opened(path: str, folder: Path, device: torch.device, max_length: int, slots: int) -> Way:
    """path: "published"; "float32"; "bf16": float32 weights, bf16 passes; "bfloat16": weights;
    "lora": adapters in all linear layers, on a GPU with bf16 passes; "many": such adapters of
    `slots` prompts at once."""
    model = texts.language_model(folder, device)
    adapters = "bf16" if device.type == "cuda" else "float32"
    if path == "published":
        return Published(model, max_length)
    if path == "many":
        return Together(model.eval(), slots, adapters)
    if path == "bfloat16":
        model = model.to(torch.bfloat16)
    if path == "lora":
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config)
        return Hullkit(model.eval(), adapters)
    return Hullkit(model.eval(), "bf16" if path == "bf16" else "float32")
