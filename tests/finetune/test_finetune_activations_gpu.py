# SPDX-License-Identifier: Apache-2.0
"""activations="auto" on a CUDA device: what does not fit is computed again."""

from __future__ import annotations

import pytest
import torch
from _models import COUNTS, Before, distance, injected, llama, state, texts
from hullkit.finetune import TestTimeFinetuner
from hullkit.finetune.capture_memory import CaptureMemory
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]


def result(model: torch.nn.Module, **options: object) -> tuple[str, str, dict[str, Tensor]]:
    tuner = TestTimeFinetuner(model, lr=1e-3, **options)  # type: ignore[arg-type]
    with tuner.adapted(texts(), COUNTS):
        weights = state(model)
    assert tuner.last_report is not None
    return tuner.last_report.path, tuner.last_report.activations, weights


def test_captured_passes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().cuda()
    before = Before(model)
    *facts, wanted = result(model, capture=True)
    assert facts == ["captured", "keep"]
    monkeypatch.setattr(CaptureMemory, "free", lambda memory: 1000)
    *facts, ours = result(model, capture=True)
    assert facts == ["captured", "recompute"]
    assert distance(ours, wanted) <= 1e-5
    *facts, _ = result(model, capture=True, activations="keep")
    assert facts == ["captured", "keep"]
    before.check()


def test_eager_passes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().cuda()
    before = Before(model)
    _, _, wanted = result(model, capture=False, activations="recompute")
    own, calls = LlamaDecoderLayer.forward, 0

    def forward(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("injected")
        return own(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    *facts, ours = result(model, capture=False)
    assert facts == ["eager", "recompute"]
    assert distance(ours, wanted) <= 1e-5  # sums of embeddings have no fixed order
    calls = 0
    tuner = TestTimeFinetuner(model, capture=False, activations="keep")
    assert injected(tuner.adapted(texts(), COUNTS), torch.OutOfMemoryError)
    before.check()
