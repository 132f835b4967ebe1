# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: models whose own loss is not that of next tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hullkit.reference as reference
import pytest
import torch
import torch.nn.functional as F
from _models import VOCABULARY, Before, gpt2, texts
from hullkit import PromptBatch, TestTimeFinetuner, bits_per_byte
from hullkit.language_model.own_loss import scores_in_place
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
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


@pytest.mark.parametrize("shift", [0, 1])
def test_logits_that_do_not_tell(shift: int) -> None:
    """A text of one token again and again has one loss, in place or not."""
    model = OwnLoss(shift)
    same = torch.full((6,), 3)
    with torch.no_grad():
        model.embedding.weight[3] = 0.0  # so that all positions have the same logits
    tuner = TestTimeFinetuner(model, lr=0.0, refresh_interval=1)
    assert len(tuner.adapt_([same, *texts(2)], [2, 1, 2]).losses) == 5
    assert model.labelled == (2 if shift == 0 else 6)  # one to find out


def with_equal_logits(build: Any) -> Any:
    model = build()
    head = model.head if isinstance(model, OwnLoss) else model.lm_head
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("build", [bart, gpt2, lambda: OwnLoss(0), lambda: OwnLoss(1)])
def test_a_last_layer_of_zeros(build: Any, options: dict[str, Any]) -> None:
    """All losses are equal then, and their gradients are not."""
    model = with_equal_logits(build)
    tuner = TestTimeFinetuner(model, lr=0.01, **options)
    losses = tuner.adapt_(texts(3), COUNTS).losses
    wanted = reference.finetune(with_equal_logits(build), texts(3), COUNTS, lr=0.01)
    assert losses == pytest.approx(wanted, rel=0.02 if options else 1e-5)


class Unforgiving(OwnLoss):
    """Its loss is of a third kind, or knows no label that is not scored."""

    def __init__(self, kind: str) -> None:
        super().__init__(0)
        self.kind = kind
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embedding(input_ids).cumsum(1))
        if labels is None:
            return SimpleNamespace(logits=logits)
        if self.kind == "two later":
            loss = F.cross_entropy(logits[0, :-2], labels[0, 2:])
        else:
            loss = -logits.log_softmax(2)[:, :-1].gather(2, labels[:, 1:, None]).mean()
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("kind", ["two later", "every label"])
def test_other_losses_of_equal_logits_stay_the_models_own(kind: str) -> None:
    model, wanted = Unforgiving(kind), Unforgiving(kind)
    ids = texts(1)[0]
    TestTimeFinetuner(model, lr=0.01).adapt_([ids], [1])
    optimizer = torch.optim.Adam(wanted.parameters(), lr=0.01)
    wanted(ids[None], ids[None]).loss.backward()
    optimizer.step()
    for own, other in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-7)


def test_labels_that_were_shifted_for_such_a_model_are_refused() -> None:
    """They would be shifted once more."""
    ids = texts(1)[0]
    shifted = torch.cat([ids[1:], torch.tensor([-100])])
    masked = ids.masked_fill(torch.arange(len(ids)) < 5, -100)
    for first in (False, True):
        tuner = TestTimeFinetuner(bart())
        if first:
            tuner.adapt_([{"input_ids": ids, "labels": masked}], [1])
        # Once the loss is known, before anything is touched.
        found = tuner.adapted if first else tuner.adapt_
        name = r"examples\[0\]\['labels'\]" if first else "labels"
        with pytest.raises(ValueError, match=f"^{name}: expected the token ids, or -100"):
            found([{"input_ids": ids, "labels": shifted}], [1])


class Careless(OwnLoss):
    """It writes to its inputs, drops out in eval mode, and multiplies halves under autocast."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, mask: Any = None) -> Any:
        x = self.embedding(input_ids.clone())
        input_ids.fill_(7)
        x = F.dropout(x.cumsum(1), 0.5)
        logits = self.head(x if mask is None else x * mask[..., None])
        loss = None if labels is None else F.cross_entropy(logits[0].float(), labels[0])
        return SimpleNamespace(logits=logits, loss=loss)


def test_the_trial_of_later_tokens_runs_the_model_as_a_pass_does() -> None:
    model = Careless(0)
    model.head.bfloat16()
    ids = texts(1)[0]
    mask = torch.ones(1, len(ids))
    tuner = TestTimeFinetuner(model, precision="bf16")
    given = ids.clone()
    assert len(tuner.adapt_([{"input_ids": given, "mask": mask}], [1]).losses) == 1
    assert torch.equal(given, ids)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")
def test_learned_positions_before_the_tokens() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(bart(), config).eval()
    ids = texts(1)[0]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, 3:]
    losses = TestTimeFinetuner(model).adapt_([ids], [1]).losses
    assert losses == pytest.approx([float(F.cross_entropy(logits[:-1], ids[1:]))], rel=1e-4)


def test_what_tells_both_losses_apart() -> None:
    logits, labels = torch.randn(1, 6, 9), torch.arange(6)[None]

    def found(loss: Tensor) -> bool | None:
        return scores_in_place(SimpleNamespace(logits=logits, loss=loss), labels)

    here = F.cross_entropy(logits[0], labels[0])
    shifted = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    assert [found(here), found(shifted), found(here + 0.5)] == [True, False, False]
    logits = logits * 1e-4  # the two are near each other
    here = F.cross_entropy(logits[0], labels[0])
    shifted = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    assert found((here + shifted) / 2) is None


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    before = Before(model)
    tuner = TestTimeFinetuner(model)
    masked = {"input_ids": texts(1)[0], "attention_mask": torch.ones(17, dtype=torch.int64)}
    masked["attention_mask"][-1] = 0
    for example in (texts(1)[0], texts(1)[0], masked):
        with pytest.raises(ValueError, match=r"causal .* BertForMaskedLM, whose logits depend on"):
            tuner.adapt_([example], [1])
        before.check()
    with pytest.raises(ValueError, match="whose logits depend on"):
        TestTimeFinetuner(model).adapt_([masked], [1])
    before.check()


@pytest.mark.gpu
@pytest.mark.plain_memory
def test_shifted_labels_beside_the_example_that_was_recorded() -> None:
    """They are replayed by the graph of another example of their shape."""
    model = bart().cuda()
    before = Before(model)
    ids = texts(1)[0]
    shifted = {"input_ids": ids, "labels": ids.roll(-1)}
    with pytest.raises(ValueError, match=r"examples\[1\]\['labels'\]: expected the token ids"):
        TestTimeFinetuner(model, capture=True).adapt_([ids, shifted], [1, 1])
    before.check()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize(
    "take",
    [
        TestTimeFinetuner,
        lambda model: PromptBatch(model, slots=1),
        lambda model: bits_per_byte(model, texts(1)[0], 9),
    ],
    ids=["tuner", "batch", "score"],
)
def test_models_without_logits_of_next_tokens_are_refused(take: Any) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder, T5ForConditionalGeneration"):
        take(T5ForConditionalGeneration(config))
    small = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 1, "pad_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**small))
    peft = pytest.importorskip("peft", reason="an extra is not installed")
    for one in (model, peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=True))):
        with pytest.raises(ValueError, match=r"model: .* one whose logits are of a whole text"):
            take(one)


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
def test_a_part_of_torch_jit_is_refused() -> None:
    model = OwnLoss(1)
    model.act = torch.jit.trace(nn.ReLU(), torch.zeros(2))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"modules of Python, got one of torch\.jit: 'act'"):
        TestTimeFinetuner(model)
