# SPDX-License-Identifier: Apache-2.0
"""What a block replaces in a batch's base model is put back; what it writes is told."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY, llama, rwkv
from _prompts import DEVICE, PRECISIONS, TOGETHER, batch_of, text
from torch import nn
from torch.nn.utils import parametrize

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

QUERY = hullkit.Query([text(9, 0)], [2], hullkit.prompt_batch.Score(text(9, 1)))
CHANGED = "expected a block that leaves the base model as it is"


def write(model: Any) -> None:
    model.lm_head.weight.mul_(2)


def write_and_raise(model: Any) -> None:
    write(model)
    raise ArithmeticError("of then")


def write_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        write(model)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.embed_tokens.weight", lambda m: m.half()),
        ("model.embed_tokens.weight", lambda m: m.to("meta")),
        ("model.embed_tokens.weight", lambda m: m.resize_token_embeddings(VOCABULARY + 9)),
        ("lm_head", lambda m: setattr(m, "lm_head", nn.Linear(32, VOCABULARY, device=DEVICE))),
        ("lm_head.weight", lambda m: parametrize.register_parametrization(
            m.lm_head, "weight", nn.Identity())),
        ("model.layers.1", lambda m: m.model.layers.__delitem__(1)),
        ("model.layers.2", lambda m: m.model.layers.append(m.model.layers[0])),
        ("model.layers.0.mlp", lambda m: setattr(m.model.layers[0], "mlp", nn.Identity())),
        ("model.layers.0.mlp.up_proj",
         lambda m: setattr(m.model.layers[0].mlp, "up_proj", nn.Identity())),
        ("model.rotary_emb.inv_freq", lambda m: m.model.rotary_emb.double()),
    ],
)  # fmt: skip
def test_what_a_block_replaces_is_put_back(
    name: str, change: Callable[[Any], Any], precision: str
) -> None:
    model: Any = llama().to(DEVICE)
    before, parts = state(model), [(m, type(m)) for m in model.modules()]
    batch = batch_of(model, 2, precision=precision)
    alone = [*batch.map([QUERY] * 4)]

    def then(adapted: Any) -> None:
        change(adapted)

    first, wrong, *others = batch.map([QUERY, QUERY._replace(then=then), QUERY, QUERY])
    assert str(wrong.error).startswith(f"{name}: {CHANGED}")
    assert [(a.value, a.losses) for a in (first, *others)] == [
        (a.value, a.losses) for a in (alone[0], *alone[2:])
    ]
    with pytest.raises(RuntimeError, match=f"{name}: {CHANGED}"), batch.slot(0) as adapted:
        then(adapted)
    assert [(m, type(m)) for m in model.modules()] == parts
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(after[key].dtype is tensor.dtype for key, tensor in before.items())
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY


def test_a_block_that_raises_keeps_its_own_error() -> None:
    model: Any = llama().to(DEVICE)

    def change(adapted: Any, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            write(adapted)
        else:
            del adapted.half().model.layers[0]
        raise error

    batch = batch_of(model, 2)
    thens = [partial(change, error=ArithmeticError("of then"))] * 2
    answers = [*batch.map([QUERY._replace(then=then) for then in thens])]
    assert [type(a.error) for a in answers] == [ArithmeticError] * 2
    with pytest.raises(KeyboardInterrupt):
        list(batch.map([QUERY._replace(then=partial(change, error=KeyboardInterrupt()))]))
    assert (model.dtype, len(model.model.layers)) == (torch.float32, 2)
    assert [a.error for a in batch.map([QUERY])] == [None]
    try:
        raise KeyError("being handled")
    except KeyError:
        with pytest.raises(RuntimeError, match=CHANGED), batch.slot(0) as adapted:
            adapted.half()


@pytest.mark.parametrize("then", [write, write_and_raise, write_in_inference_mode])
def test_what_a_block_writes_ends_the_map(then: Callable[[Any], Any]) -> None:
    """Later queries would be adapted on another base."""
    told = r"got a write to 'lm_head\.weight' of shape .* the base model is changed: load it again"
    batch = batch_of(llama().to(DEVICE), 2, **TOGETHER)
    answers: list[hullkit.Answer] = []
    with pytest.raises(RuntimeError, match=told):
        answers.extend(batch.map([QUERY, QUERY, QUERY._replace(then=then), QUERY]))
    assert [a.error for a in answers] == [None, None]
    with pytest.raises(RuntimeError, match=told), batch.slot(0) as model:
        then(model)
    assert [a.error for a in batch.map([QUERY])] == [None]  # on the base as it is now


class Counting(nn.Module):
    """Its forward counts its calls: in a buffer, and in one that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        out: torch.Tensor = self.head(self.inner(self.embedding(ids)))
        return out


def test_what_a_forward_and_a_reader_do_is_no_change() -> None:
    model = Counting().to(DEVICE)
    batch = batch_of(model, 1, target=["inner"], capture=False)

    def then(adapted: Any) -> float:
        adapted.train().float().requires_grad_(True)
        deepcopy(adapted).half()
        adapted.note = "mine"
        calls = float(adapted.calls)
        adapted(text(5, 0)[None].to(DEVICE))
        assert float(adapted.calls) == float(adapted.replaced) == calls + 1
        return calls

    first, second = batch.map([QUERY._replace(then=then)] * 2)
    assert (first.error, second.error) == (None, None)
    assert second.value > first.value


def test_rwkv_may_rescale_its_weights() -> None:
    model = rwkv().to(DEVICE)
    assert not model.rwkv.layers_are_rescaled
    with batch_of(model, 1).slot(0) as adapted:
        adapted(text(5, 0)[None].to(DEVICE))
    assert model.rwkv.layers_are_rescaled


def test_a_change_between_two_blocks_is_the_callers() -> None:
    model: Any = llama().to(DEVICE)
    batch = batch_of(model, 1)
    ids = text(9, 0)[None].to(DEVICE)
    found = []
    for scale in (1.0, 2.0):
        model.lm_head = deepcopy(model.lm_head)
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        with batch.slot(0) as adapted, torch.no_grad():
            found.append(adapted(ids).logits)
    assert torch.allclose(found[1], 2.0 * found[0])
    with deepcopy(batch).slot(0) as adapted:
        assert adapted is not model
