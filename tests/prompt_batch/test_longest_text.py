# SPDX-License-Identifier: Apache-2.0
"""Rotary positions that stretch with the longest text so far: no text feels an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY
from _prompts import DEVICE, batch_of, text
from hullkit.prompt_batch import Score
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

ORIGINAL = 16
SHORT, MIDDLE, LONG = text(9, 1), text(24, 2), text(60, 3)


def dynamic() -> Any:
    """It is never captured: its forward asks the device for the longest position."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": ORIGINAL}
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    config = LlamaConfig(vocab_size=VOCABULARY, rope_parameters=rope, **sizes, **layers)
    return LlamaForCausalLM(config).to(DEVICE).eval()


def query(ids: torch.Tensor) -> hullkit.Query:
    return hullkit.Query([ids], [2], Score(ids))


# Texts that share a pass are padded to the longest of them: with tf32 there is one slot.
@pytest.mark.parametrize(("precision", "slots"), [("float32", 1), ("float32", 2), ("tf32", 1)])
def test_a_query_after_a_longer_one(precision: str, slots: int) -> None:
    options: dict[str, Any] = {"slots": slots, "precision": precision, "capture": False}
    queries = [query(ids) for ids in (LONG, MIDDLE, SHORT, MIDDLE)]
    alone = [next(batch_of(dynamic(), **options).map([one]))[:3] for one in queries]
    for place, answer in enumerate(batch_of(dynamic(), **options).map(queries)):
        assert (answer.value, answer.losses) == (alone[place][1], alone[place][2])


def in_slot(batch: hullkit.PromptBatch) -> None:
    with batch.slot(0) as model:
        model(LONG[None].to(DEVICE))


USES: list[Callable[[hullkit.PromptBatch], Any]] = [
    lambda batch: list(batch.map([query(LONG)])),
    lambda batch: batch.adapt_([query(LONG)]),
    lambda batch: batch(LONG[None].to(DEVICE)),
    lambda batch: batch.generate(LONG[None].to(DEVICE), max_new_tokens=2),
    in_slot,
]


def rotary(model: nn.Module) -> list[dict[str, Any]]:
    [module] = [m for m in model.modules() if hasattr(m, "max_seq_len_cached")]
    return [dict(vars(module)), dict(module._buffers)]


@pytest.mark.parametrize("use", USES)
def test_the_model_is_as_before(use: Callable[[hullkit.PromptBatch], Any]) -> None:
    model = dynamic()
    logits = model(MIDDLE[None].to(DEVICE)).logits
    before = rotary(model)  # with what its own forward keeps
    use(batch_of(model, slots=1, capture=False))
    for now, then in zip(rotary(model), before, strict=True):
        assert now.keys() == then.keys()
        assert all(now[name] is then[name] for name in now if name != "training")
    assert torch.equal(model(MIDDLE[None].to(DEVICE)).logits, logits)
