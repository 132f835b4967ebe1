# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: models whose own loss is not that of next tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hullkit.reference as reference
import pytest
import torch
import torch.nn.functional as F
from _models import VOCABULARY, Before, texts
from hullkit import PromptBatch, TestTimeFinetuner
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

COUNTS = [3, 2, 2]
pytestmark = pytest.mark.usefixtures("one_thread")


class OwnLoss(nn.Module):
    """Its loss is that of labels `shift` positions later, and of some more."""

    def __init__(self, shift: int, more: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.head = nn.Linear(12, VOCABULARY)
        self.shift, self.more = shift, more
        self.labelled = 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embedding(input_ids).cumsum(1))
        if labels is None:
            return SimpleNamespace(logits=logits)
        self.labelled += 1
        length = labels.shape[1] - self.shift
        loss = F.cross_entropy(logits[0, :length], labels[0, self.shift :])
        return SimpleNamespace(logits=logits, loss=loss + self.more * logits.square().mean())


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=VOCABULARY, decoder_ffn_dim=24, max_position_embeddings=64, **sizes
    )
    return BartForCausalLM(config)


@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("build", [bart, lambda: OwnLoss(0)], ids=["bart", "own"])
def test_labels_scored_in_place_are_scored_as_next_tokens(
    build: Any, options: dict[str, Any]
) -> None:
    tuner = TestTimeFinetuner(build(), lr=0.01, **options)
    losses = tuner.adapt_(texts(3), COUNTS).losses
    wanted = reference.finetune(build(), texts(3), COUNTS, lr=0.01)
    near = {"rel": 0.02} if options.get("precision") else {"rel": 1e-5}
    assert losses == pytest.approx(wanted, **near)


def test_the_models_own_loss_stays_where_it_is_of_next_tokens_or_more() -> None:
    for shift, more in ((1, 0.0), (1, 0.5), (0, 0.5)):
        model = OwnLoss(shift, more)
        losses = TestTimeFinetuner(model, refresh_interval=1).adapt_(texts(3), COUNTS).losses
        assert model.labelled == len(losses)
    model = OwnLoss(0)
    TestTimeFinetuner(model, refresh_interval=1).adapt_(texts(3), COUNTS)
    assert model.labelled == 1


def test_it_is_found_out_when_it_can_be() -> None:
    """A text of one token again and again has one loss, in place or not."""
    model = OwnLoss(0)
    same = torch.full((6,), 3)
    with torch.no_grad():
        model.embedding.weight[3] = 0.0  # so that all positions have the same logits
    tuner = TestTimeFinetuner(model, lr=0.0, refresh_interval=1)
    assert len(tuner.adapt_([same, *texts(2)], [2, 1, 2]).losses) == 5
    assert model.labelled == 3


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    before = Before(model)
    tuner = TestTimeFinetuner(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"causal .* BertForMaskedLM, whose logits depend on"):
            tuner.adapt_(texts(2), [1, 1])
        before.check()


@pytest.mark.parametrize("take", [TestTimeFinetuner, lambda model: PromptBatch(model, slots=1)])
def test_an_encoder_decoder_is_refused(take: Any) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder, T5ForConditionalGeneration"):
        take(T5ForConditionalGeneration(config))


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
def test_a_part_of_torch_jit_is_refused() -> None:
    model = OwnLoss(1)
    model.act = torch.jit.trace(nn.ReLU(), torch.zeros(2))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"modules of Python, got one of torch\.jit: 'act'"):
        TestTimeFinetuner(model)
