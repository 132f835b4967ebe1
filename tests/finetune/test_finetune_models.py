# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: models set up for something special, and tuners that travel."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import COUNTS, Before, gpt2, llama, plain, same_bits, texts
from hullkit import bits_per_byte
from hullkit.finetune import TestTimeFinetuner
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers renames what turns it on.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated"),
]


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=31, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.3)
    return BloomForCausalLM(config)


def opt() -> OPTForCausalLM:
    """Its layers have dropout of their own, by their own training flag."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=31,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.5,
        )
    )


class Held:
    """Bytes that passes keep for their backward half, at most; parameters are there anyway."""

    def __init__(self) -> None:
        self.now = self.most = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed[0]):
            yield

    def _pack(self, tensor: Tensor) -> tuple[Tensor, Any]:
        if isinstance(tensor, nn.Parameter):
            return tensor, None
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        alive = nn.Identity()  # anything that tells of its end
        weakref.finalize(alive, self._gone, size)
        return tensor, alive

    def _gone(self, size: int) -> None:
        self.now -= size


def adapted(model: nn.Module) -> tuple[tuple[float, ...], list[Tensor], int]:
    """Losses, weights, and bytes saved."""
    tuner = TestTimeFinetuner(model, lr=1e-2)
    before = Before(model)
    held = Held()
    with held.counted(), tuner.adapted(texts(), COUNTS):
        weights = [p.detach().clone() for p in model.parameters()]
    before.check()
    assert tuner.last_report is not None
    return tuner.last_report.losses, weights, held.most


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2, bloom, opt])
def test_gradient_checkpointing(build: Any, reentrant: bool) -> None:
    """Less is kept, and nothing else changes: no dropout in layers that are in training mode."""
    losses, weights, kept = adapted(build())
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        checkpointed = adapted(model)
        assert checkpointed[0] == pytest.approx(losses, rel=1e-5)
        for got, wanted in zip(checkpointed[1], weights, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)
        assert checkpointed[2] < 0.8 * kept
    model.gradient_checkpointing_disable()
    assert adapted(model)[2] > 0.9 * kept


def test_gradient_checkpointing_that_cannot_work() -> None:
    model = plain()
    model.gradient_checkpointing = True
    with (
        pytest.warns(UserWarning, match="gradient checkpointing has no effect: .* eval mode"),
        TestTimeFinetuner(model).adapted(texts(), COUNTS),
    ):
        pass


def pickled(tuner: TestTimeFinetuner) -> TestTimeFinetuner:
    copied: TestTimeFinetuner = pickle.loads(pickle.dumps(tuner))
    return copied


def saved(tuner: TestTimeFinetuner) -> TestTimeFinetuner:
    file = io.BytesIO()
    torch.save(tuner, file)
    file.seek(0)
    loaded: TestTimeFinetuner = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("take", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("build", [plain, llama])
def test_tuners_travel(take: Any, build: Any) -> None:
    tuner = TestTimeFinetuner(build(), lr=1e-2, refresh_interval=3, betas=(0.5, 0.9))
    with tuner.adapted(texts(), COUNTS):
        pass
    other = take(tuner)
    assert other.model is not tuner.model
    assert other.last_report == tuner.last_report
    ends = []
    for one in (tuner, other):
        before = Before(one.model)
        with one.adapted(texts(), COUNTS):
            ends.append([p.detach().clone() for p in one.model.parameters()])
        before.check()
    assert all(map(same_bits, *ends))
    assert copy.copy(tuner).model is tuner.model


def test_a_tuner_that_adapts_stays() -> None:
    """And one of a wrapper: a part of its model is adapted."""
    tuner = TestTimeFinetuner(plain())
    wrapper = TestTimeFinetuner(nn.Sequential(tuner.model))
    with tuner.adapted(texts(), COUNTS):
        for own in (tuner, wrapper):
            for take in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(RuntimeError, match="model that is not being adapted"):
                    take(own)
    copy.deepcopy(tuner)


def refused(model: Any, message: str) -> None:
    """On construction; and by the call, if it has become so since."""
    with pytest.raises(ValueError, match=message):
        TestTimeFinetuner(model)
    since = plain()
    tuner = TestTimeFinetuner(since)
    since.__class__, since.__dict__ = type(model), vars(model)
    for call in (lambda: tuner.adapted(texts(), COUNTS), lambda: tuner.warmup([3])):
        with pytest.raises(ValueError, match=message):
            call()


def test_sparse_embedding() -> None:
    model = nn.Sequential(nn.Embedding(31, 8, sparse=True), nn.Linear(8, 31))
    refused(model, "model: expected dense gradients, got an embedding with sparse=True: '0'")
    model[0].requires_grad_(False)
    with TestTimeFinetuner(model).adapted(texts(), COUNTS):
        pass


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = llama()
    refused(model, r"got one made in torch.inference_mode\(\): 'model.embed_tokens.weight'")
    assert bits_per_byte(model, texts()[0], 9) > 0


def test_meta_parameters() -> None:
    with torch.device("meta"):
        model = llama()
    message = "model: expected parameters in memory, got '.*' on the meta"
    refused(model, message)
    with pytest.raises(ValueError, match=message):
        bits_per_byte(model, texts()[0], 9)


def test_offloaded_by_accelerate(tmp_path: Path) -> None:
    """A score is right; training is refused: its weights are nowhere."""
    accelerate = pytest.importorskip("accelerate", reason="the test extra is not installed")
    wanted = bits_per_byte(llama(), texts()[0], 9)
    model = accelerate.disk_offload(llama(), tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    refused(model, "model: expected parameters in memory, got")
    assert bits_per_byte(model, texts()[0], 9) == pytest.approx(wanted, rel=1e-6)


def test_a_forward_that_somebody_replaces_between_queries() -> None:
    """Labels, options and inputs are those of the forward that runs."""
    model: Any = llama()
    tuner = TestTimeFinetuner(model)
    wanted = tuner.adapt_(texts(1), [1]).losses
    model.load_state_dict(llama().state_dict())
    own = model.forward

    def logits(input_ids: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = own(input_ids).logits
        return out if scale is None else out * scale

    model.forward = logits
    assert tuner.adapt_(texts(1), [1]).losses == pytest.approx(wanted)
    tuner.adapt_([{"input_ids": texts(1)[0], "scale": torch.tensor(2.0)}], [1])
    with pytest.raises(ValueError, match="expected inputs of the model's forward, got 'factor'"):
        tuner.adapted([{"input_ids": texts(1)[0], "factor": torch.tensor(2.0)}], [1])

    def takes_any(input_ids: Tensor, **others: Tensor) -> Tensor:
        return logits(input_ids, others["factor"])

    model.forward = takes_any
    model.load_state_dict(llama().state_dict())
    found = tuner.adapt_([{"input_ids": texts(1)[0], "factor": torch.tensor(1.0)}], [1]).losses
    assert found == pytest.approx(wanted)
